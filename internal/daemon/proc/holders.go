package proc

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Holders finds the processes that have path open for writing, other than this one:
// who only reads it, like a backup, cannot hold a lock for writing on it. It looks at
// every process that may be looked at: a last resort, for when the files that name
// them are lost. An absent file has no holders.
func Holders(path string) ([]Identity, error) {
	want, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot find who holds %s: %w", path, err)
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var holders []Identity
	for _, p := range procs {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil || pid == os.Getpid() {
			continue
		}
		if !hasOpen(p, want) {
			continue
		}
		if id, err := Identify(pid); err == nil {
			holders = append(holders, id)
		}
	}
	return holders, nil
}

// hasOpen tells whether the process of dir, a directory of /proc, has the file open
// for writing; false for one that is gone or may not be looked at.
func hasOpen(dir string, file fs.FileInfo) bool {
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return false
	}
	for _, fd := range fds {
		info, err := os.Stat(filepath.Join(dir, "fd", fd.Name()))
		if err == nil && os.SameFile(info, file) && forWriting(filepath.Join(dir, "fdinfo", fd.Name())) {
			return true
		}
	}
	return false
}

// forWriting reads the access mode of a descriptor from its fdinfo, where flags are
// octal, see proc_pid_fdinfo(5).
func forWriting(fdinfo string) bool {
	data, err := os.ReadFile(fdinfo)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		text, ok := strings.CutPrefix(line, "flags:")
		if !ok {
			continue
		}
		flags, err := strconv.ParseUint(strings.TrimSpace(text), 8, 64)
		mode := flags & unix.O_ACCMODE
		return err == nil && (mode == unix.O_WRONLY || mode == unix.O_RDWR)
	}
	return false
}
