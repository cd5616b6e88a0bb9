package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"banger/api"
	"banger/internal/config"
	"banger/internal/daemon/vm"
)

// unpackPrograms writes the embedded programs into the state directory, by the hash
// of what they are: a new release never replaces a file that runs.
func unpackPrograms(l config.Layout, programs fs.FS) (vm.Programs, error) {
	var p vm.Programs
	hash := sha256.New()
	names := []string{"banger-shim", "banger-guest"}
	contents := make([][]byte, len(names))
	for i, name := range names {
		var err error
		if programs == nil {
			err = fs.ErrNotExist
		} else {
			contents[i], err = fs.ReadFile(programs, name)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return p, api.Errorf(api.NotReady, "this bangerd was built without %s", name).WithHint("make build")
		}
		if err != nil {
			return p, err
		}
		hash.Write(contents[i])
	}
	dir := l.Program(hex.EncodeToString(hash.Sum(nil))[:16])
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return p, err
	}
	for i, name := range names {
		if err := installProgram(filepath.Join(dir, name), contents[i]); err != nil {
			return p, err
		}
	}
	return vm.Programs{Shim: filepath.Join(dir, names[0]), Guest: filepath.Join(dir, names[1])}, nil
}

// installProgram writes an executable at once: it is whole or it is not there.
func installProgram(path string, content []byte) error {
	if info, err := os.Stat(path); err == nil && info.Size() == int64(len(content)) {
		return nil
	}
	temp := path + ".new"
	if err := os.WriteFile(temp, content, 0o755); err != nil {
		return err
	}
	return os.Rename(temp, path)
}
