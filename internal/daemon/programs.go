package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"banger/api"
	"banger/internal/config"
	"banger/internal/daemon/vm"
)

// unpackPrograms writes the embedded programs into the state directory, by the hash
// of what they are: a new release never replaces a file that runs. On a full disk the
// next start of a VM tries again: stop and remove need none of them, and make room.
func unpackPrograms(l config.Layout, programs fs.FS) (vm.Programs, error) {
	hash := sha256.New()
	names := []string{"banger-shim", "banger-guest", "banger-net"}
	for _, name := range names {
		content, err := []byte(nil), fs.ErrNotExist
		if programs != nil {
			content, err = fs.ReadFile(programs, name)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return vm.Programs{}, api.Errorf(api.NotReady, "this bangerd was built without %s", name).WithHint("make build")
		}
		if err != nil {
			return vm.Programs{}, err
		}
		hash.Write(content)
	}
	dir := l.Program(hex.EncodeToString(hash.Sum(nil))[:16])
	var mu sync.Mutex // a leaf
	unpack := func() error {
		mu.Lock()
		defer mu.Unlock()
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if err := removeOthers(dir); err != nil { // first: it makes room
			return err
		}
		for _, name := range names {
			if err := installProgram(filepath.Join(dir, name), programs, name); err != nil {
				return err
			}
		}
		return nil
	}
	err := unpack()
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		err = nil
	}
	return vm.Programs{
		Shim: filepath.Join(dir, names[0]), Guest: filepath.Join(dir, names[1]), Net: filepath.Join(dir, names[2]), Unpack: unpack,
	}, err
}

// removeOthers removes the programs of other releases. A shim that runs needs its file
// no more, and holds that of banger-net open.
func removeOthers(dir string) error {
	all, err := os.ReadDir(filepath.Dir(dir))
	if err != nil {
		return err
	}
	for _, e := range all {
		if e.Name() != filepath.Base(dir) {
			if err := os.RemoveAll(filepath.Join(filepath.Dir(dir), e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// installProgram writes an executable at once: it is whole or it is not there.
func installProgram(path string, programs fs.FS, name string) error {
	want, err := fs.Stat(programs, name)
	if err != nil {
		return err
	}
	if info, err := os.Stat(path); err == nil && info.Size() == want.Size() {
		return nil
	}
	content, err := fs.ReadFile(programs, name)
	if err != nil {
		return err
	}
	temp := path + ".new"
	if err := os.WriteFile(temp, content, 0o755); err != nil {
		os.Remove(temp)
		return err
	}
	return os.Rename(temp, path)
}
