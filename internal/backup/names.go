package backup

import (
	"strings"
	"time"
)

// Suffix ends the names of files in a folder of backups. A name is
//
//	countersign-ID-TIME SUFFIX
//
// without the space: ID is that of the appliance's log and tells the files of several appliances
// apart, TIME is the time at which the file was begun (UTC, such as 20260102T030405Z).
type Suffix string

// The suffixes. A backup that is being written has PartSuffix behind its name.
const (
	Whole Suffix = ".backup"
	Lists Suffix = ".lists"

	PartSuffix = ".part"
)

const nameTime = "20060102T150405Z"

// Name returns the name of a file.
func (s Suffix) Name(id string, begun time.Time) string {
	return "countersign-" + id + "-" + begun.UTC().Format(nameTime) + string(s)
}

// Begun returns the time in a name of an appliance's file with the suffix. ok is false for other
// names.
func (s Suffix) Begun(name, id string) (begun time.Time, ok bool) {
	text, prefixed := strings.CutPrefix(name, "countersign-"+id+"-")
	text, suffixed := strings.CutSuffix(text, string(s))
	begun, err := time.Parse(nameTime, text)
	return begun, prefixed && suffixed && err == nil && begun.Format(nameTime) == text
}
