// Package initrd makes the initramfs of one boot: banger-guest as /init, the
// kernel modules that reach the root disk, and, as a second archive appended to
// the first, the configuration of this boot. The kernel unpacks the archives one
// after the other, so nothing of the configuration appears on its command line.
// An initramfs holds secrets of its boot: write it where only the VMM can read it.
//
//	/init                  banger-guest
//	/banger/modules/*.ko   wire.ModulesDir, loaded in the order of Config.Modules
//	/dev /proc /sys /newroot
//	/banger/config.json    wire.ConfigPath, mode 0600 (second archive)
package initrd

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"

	"banger/internal/guest/wire"
)

// newRoot is where package boot mounts the root disk.
const newRoot = "/newroot"

// Write writes an uncompressed initramfs to w. guest is the host's path of
// banger-guest, modules are host paths in the order of loading; Config.Modules is
// taken from them, whatever cfg says. The order of the archive and its metadata
// depend on the arguments alone.
func Write(w io.Writer, guest string, modules []string, cfg wire.Config) error {
	cfg.Modules = make([]string, len(modules))
	seen := make(map[string]bool, len(modules))
	for i, m := range modules {
		name := filepath.Base(m)
		if seen[name] {
			return fmt.Errorf("cannot write initramfs: two modules are named %s", name)
		}
		seen[name] = true
		cfg.Modules[i] = name
	}
	config, err := json.Marshal(cfg)
	if err != nil {
		return fmt.Errorf("cannot write initramfs: %w", err)
	}

	programs := newArchive(w)
	for _, dir := range []string{"dev", "proc", "sys", newRoot[1:], "banger", wire.ModulesDir[1:]} {
		programs.add(entry{name: dir, mode: typeDir | 0o755}, nil)
	}
	programs.addFile("init", 0o755, guest)
	for i, m := range modules {
		programs.addFile(path.Join(wire.ModulesDir[1:], cfg.Modules[i]), 0o644, m)
	}
	if err := programs.close(); err != nil {
		return fmt.Errorf("cannot write initramfs: %w", err)
	}

	boot := newArchive(w)
	boot.add(entry{name: wire.ConfigPath[1:], mode: typeFile | 0o600, size: int64(len(config))}, bytes.NewReader(config))
	if err := boot.close(); err != nil {
		return fmt.Errorf("cannot write initramfs: %w", err)
	}
	return nil
}

// addFile adds the regular file at the host's path source.
func (a *archive) addFile(name string, perm uint32, source string) {
	if a.err != nil {
		return
	}
	f, err := os.Open(source)
	if err != nil {
		a.err = err
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		a.err = err
		return
	}
	if !info.Mode().IsRegular() {
		a.err = fmt.Errorf("%s is not a regular file", source)
		return
	}
	a.add(entry{name: name, mode: typeFile | perm, size: info.Size()}, f)
}
