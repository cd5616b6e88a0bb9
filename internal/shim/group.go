package shim

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// populated tells whether a process is left in the scope of the VM of dir: in the
// group above Config.Group. A large VMM is there for a while after the lock is free.
func populated(dir string) (bool, error) {
	data, err := os.ReadFile(filepath.Join(dir, configFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var cfg struct {
		Group string `json:"group"`
	}
	// What a crash of the host left of the file names no group, and nothing runs.
	if json.Unmarshal(data, &cfg) != nil || cfg.Group == "" {
		return false, nil
	}
	n, err := count(filepath.Join(filepath.Dir(cfg.Group), "cgroup.events"), "populated")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
		return false, nil // ENODEV: removed after it was opened
	}
	return n > 0, err
}

// outOfMemory tells whether the kernel ended a process of group for want of memory. The
// shim asks, because systemd removes the groups as soon as the shim has ended.
func outOfMemory(group string) bool {
	n, err := count(filepath.Join(group, "memory.events"), "oom_kill")
	return err == nil && n > 0
}

// count reads the number of key from a file of lines "KEY NUMBER"; absent is 0.
func count(path, key string) (int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, key+" "); ok {
			return strconv.Atoi(strings.TrimSpace(rest))
		}
	}
	return 0, nil
}
