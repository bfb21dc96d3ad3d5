package ledger

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	bolt "go.etcd.io/bbolt"
)

// Format is the version of the file's layout. A higher one belongs to a newer program, and is
// refused. oldest is the lowest that a migration begins with.
const (
	oldest = 6
	Format = oldest + len(migrations)
)

// migrations make a file of each format from oldest on into one of the next format.
var migrations = [...]func(*bolt.Tx) error{
	// 7: the ledger may have been restored from a backup. An older program does not know the record
	// and would admit again what was admitted before.
	func(*bolt.Tx) error { return nil },
}

// formatOf returns the format of a file, or an error for one that no migration leads from.
func formatOf(tx *bolt.Tx) (int, error) {
	meta := root(tx, bucketMeta)
	if meta == nil {
		return 0, fmt.Errorf("%w: it has no format", ErrCorrupt)
	}
	v := meta.Get(keyFormat)
	if len(v) != 4 {
		return 0, fmt.Errorf("%w: it has no format", ErrCorrupt)
	}
	f := int(binary.BigEndian.Uint32(v))
	switch {
	case f == 0:
		return 0, fmt.Errorf("%w: its format is 0", ErrCorrupt)
	case f > Format:
		return 0, fmt.Errorf("%w: its format is %d, of a newer version, and this program knows %d",
			ErrFormat, f, Format)
	case f < oldest:
		return 0, fmt.Errorf("%w: its format is %d, and this program knows %d to %d", ErrOlder, f, oldest, Format)
	}
	return f, nil
}

// migrate brings a file of an older format to the present one, after a copy of the file as
// PATH.format-N, which an older program can open. Each step is one transaction: after a crash, the
// next Open goes on. The copy lacks all that is admitted afterwards.
func migrate(path string, db *bolt.DB, asIs bool) error {
	var from int
	if err := db.View(func(tx *bolt.Tx) (err error) { from, err = formatOf(tx); return err }); err != nil {
		return err
	}
	if from == Format {
		return nil
	}
	if asIs {
		return fmt.Errorf("%w: %d, and this program has %d", ErrOlder, from, Format)
	}
	if err := keepCopy(db, fmt.Sprintf("%s.format-%d", path, from)); err != nil {
		return fmt.Errorf("the copy before the migration from format %d to %d: %w", from, Format, err)
	}
	for ; from < Format; from++ {
		if err := db.Update(func(tx *bolt.Tx) error {
			if err := migrations[from-oldest](tx); err != nil {
				return err
			}
			return root(tx, bucketMeta).Put(keyFormat, binary.BigEndian.AppendUint32(nil, uint32(from+1)))
		}); err != nil {
			return fmt.Errorf("the migration from format %d to %d: %w", from, from+1, err)
		}
	}
	return nil
}

// keepCopy writes a copy of the whole file to a path.
func keepCopy(db *bolt.DB, path string) error {
	temp := path + ".new"
	if err := db.View(func(tx *bolt.Tx) error { return tx.CopyFile(temp, 0o600) }); err != nil {
		os.Remove(temp)
		return err
	}
	if err := syncAndRename(temp, path); err != nil {
		return err
	}
	return syncPath(filepath.Dir(path), "folder")
}
