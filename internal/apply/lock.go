package apply

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// lockTries bounds how often a folder may vanish under who wants to lock it: each time
// another apply has ended.
const lockTries = 100

var (
	errLocked   = errors.New("another apply is under way")
	errVanished = errors.New("what was locked is not there any more")
)

// lockFolder makes the folder dir, and locks it by a file in it. The error is errLocked
// when another has it. unlockFolder removes both, so what was locked may be nobody's any
// more, while the next one makes and locks another: only what still has its name counts.
func lockFolder(dir string) (*os.File, error) {
	for range lockTries {
		lock, err := tryLock(dir)
		if !errors.Is(err, errVanished) {
			return lock, err
		}
	}
	return nil, errLocked
}

func tryLock(dir string) (_ *os.File, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	path := filepath.Join(dir, "lock")
	lock, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errVanished
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, errLocked
	}
	if err != nil {
		return nil, err
	}
	locked, err := lock.Stat()
	if err != nil {
		return nil, err
	}
	if there, err := os.Lstat(path); err != nil || !os.SameFile(locked, there) {
		return nil, errVanished
	}
	return lock, nil
}

// unlockFolder gives the folder back and removes it, unless something is in it. Once the
// file is gone the folder may be another's: nothing in it is touched any more.
func unlockFolder(dir string, lock *os.File) {
	os.Remove(filepath.Join(dir, "lock"))
	os.Remove(dir)
	lock.Close()
}
