package store

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

const (
	// reserveSlice is more than the write-ahead log, the shared memory file and the
	// record of a delete need together. The reserve is given up slice by slice: what
	// one emergency does not use may be gone a moment later, to whatever fills the disk.
	reserveSlice = 256 << 10
	reserveSize  = 8 * reserveSlice
	// reserveSlack is how much must be free before a reserve is made, in bytes: it
	// must not be what fills the disk.
	reserveSlack = 4 * reserveSize
)

// reserve is a file whose only purpose is the space that it takes.
type reserve struct {
	path string

	mu      sync.Mutex // a leaf
	present bool       // path is there in full; known after the first renew
}

func newReserve(path string) *reserve { return &reserve{path: path} }

// release gives one slice of the space back and tells whether there was any.
func (r *reserve) release() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.present = false
	st, err := os.Lstat(r.path)
	if err != nil || !st.Mode().IsRegular() {
		return false
	}
	if st.Size() <= reserveSlice {
		return os.Remove(r.path) == nil
	}
	return os.Truncate(r.path, st.Size()-reserveSlice) == nil
}

// renew makes the reserve when it is not there and the disk has room. A failure is
// no error: the reserve helps where it can.
func (r *reserve) renew() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.present {
		return
	}
	if st, err := os.Lstat(r.path); err == nil && st.Mode().IsRegular() && st.Size() == reserveSize {
		r.present = true
		return
	}
	if free, err := freeBytes(filepath.Dir(r.path)); err != nil || free < reserveSlack {
		return
	}
	r.present = r.make() == nil
}

func (r *reserve) make() error {
	f, err := os.OpenFile(r.path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = syscall.Fallocate(int(f.Fd()), 0, 0, reserveSize)
	if err != nil && !errors.Is(err, syscall.ENOSPC) {
		// A file system without fallocate: zeros take space there too.
		_, err = f.WriteAt(make([]byte, reserveSize), 0)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		os.Remove(r.path)
	}
	return err
}
