package store

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// What the errors of this package are, for errors.Is. A ConflictError says more.
var (
	ErrNotFound = errors.New("not found")
	ErrConflict = errors.New("in another state")          // always a *ConflictError
	ErrInUse    = errors.New("in use")                    // a VM was made from it
	ErrNewer    = errors.New("written by a newer banger") // of Open
	// ErrFull is a syscall.ENOSPC too.
	ErrFull = fmt.Errorf("cannot write the database: %w", syscall.ENOSPC)
)

// ExistsError is an insert of something that is taken.
type ExistsError struct {
	What string // "name", "slot", "repository" or "id"
}

func (e *ExistsError) Error() string { return "the " + e.What + " is taken" }

// ConflictError is a Transition of a VM that is in none of the states expected.
type ConflictError struct {
	State State // that it is in
}

func (e *ConflictError) Error() string        { return "it is " + string(e.State) }
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// wrap turns an error of SQLite into one of this package where there is one.
func (s *Store) wrap(err error) error {
	var e *sqlite.Error
	if err == nil || !errors.As(err, &e) || errors.Is(err, ErrFull) {
		return err
	}
	switch e.Code() {
	case sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
		return &ExistsError{What: uniqueColumn(e.Error())}
	case sqlite3.SQLITE_FULL:
		return fmt.Errorf("%w (%w)", ErrFull, err)
	}
	// SQLite has no code for a disk too full to enlarge the shared memory file or to
	// make a file beside the database.
	switch e.Code() & 0xff {
	case sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN:
		if diskFull(filepath.Dir(s.path)) {
			return fmt.Errorf("%w (%w)", ErrFull, err)
		}
		return fmt.Errorf("%w (%w)", syscall.EIO, err)
	}
	return err
}

// uniqueColumn finds "name" in "… UNIQUE constraint failed: vms.name (2067)".
func uniqueColumn(message string) string {
	_, column, _ := strings.Cut(message, "constraint failed: ")
	if _, rest, ok := strings.Cut(column, "constraint failed: "); ok {
		column = rest
	}
	column, _, _ = strings.Cut(column, " ")
	_, column, _ = strings.Cut(column, ".")
	return column
}

// isForeignKey tells a broken reference, of a row inserted or of one deleted.
func isForeignKey(err error) bool {
	var e *sqlite.Error
	return errors.As(err, &e) && e.Code()&0xff == sqlite3.SQLITE_CONSTRAINT && strings.Contains(e.Error(), "FOREIGN KEY")
}

// full marks err when it says that the disk is full.
func full(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w (%w)", ErrFull, err)
	}
	return err
}

// diskFull tells whether the disk that dir is on has less space than any write needs.
func diskFull(dir string) bool {
	free, err := freeBytes(dir)
	return err == nil && free < 128<<10
}

// freeBytes asks how much may be written to the disk that dir is on.
func freeBytes(dir string) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}
