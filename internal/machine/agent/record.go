package agent

import (
	"errors"
	"os"
	"path/filepath"
)

// Record writes the outcome of a step of the boot, for the consoles, and returns the error.
func Record(step string, err error) error {
	path := filepath.Join(runFolder, "failed-"+step)
	if err == nil {
		os.Remove(path)
		return nil
	}
	return errors.Join(err, os.MkdirAll(runFolder, 0o755), os.WriteFile(path, []byte(err.Error()), 0o644))
}

// Failed returns why a step of the boot has failed; "" is a step that has not.
func Failed(step string) string {
	b, _ := os.ReadFile(filepath.Join(runFolder, "failed-"+step))
	return string(b)
}
