// Command ownroot gives a fake guest a file system of its own, as far as it matters: a
// root directory in which all is the host's but /workspace, which is the VM's and lives
// as long as it. Otherwise guests would share it with each other and with the host.
//
// It is put where fakevmm is looked for, which lies beside it with the suffix ".real"
// and takes its place. It needs root; without, the guest gets the host as it is.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
)

func main() {
	runtime.LockOSThread() // the namespace is the thread's, and the one that execs counts
	if os.Geteuid() == 0 {
		if err := enterOwnRoot(); err != nil {
			fmt.Fprintln(os.Stderr, "fakevmm: cannot make a root directory:", err)
			os.Exit(1)
		}
	}
	err := syscall.Exec(os.Args[0]+".real", os.Args, os.Environ())
	fmt.Fprintln(os.Stderr, "fakevmm:", err)
	os.Exit(1)
}

func enterOwnRoot() error {
	dir, err := os.Getwd() // the VM's
	if err != nil {
		return err
	}
	workspace, root := filepath.Join(dir, "guest", "workspace"), filepath.Join(dir, "guest", "root")
	for _, d := range []string{workspace, root} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := syscall.Unshare(syscall.CLONE_NEWNS | syscall.CLONE_FS); err != nil {
		return err
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := syscall.Mount("tmpfs", root, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := mirror("/"+e.Name(), root, e); err != nil {
			return err
		}
	}
	if err := bind(workspace, filepath.Join(root, "workspace")); err != nil {
		return err
	}
	return errors.Join(syscall.Chroot(root), os.Chdir(dir))
}

// mirror shows a file or directory of the host's root directory below root.
func mirror(path, root string, e os.DirEntry) error {
	target := filepath.Join(root, path)
	switch {
	case path == "/workspace":
		return nil
	case e.Type()&os.ModeSymlink != 0:
		link, err := os.Readlink(path)
		if err != nil {
			return err
		}
		return os.Symlink(link, target)
	case e.IsDir():
		return bind(path, target)
	}
	return nil
}

func bind(path, target string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	return os.NewSyscallError("bind "+path, syscall.Mount(path, target, "", syscall.MS_BIND|syscall.MS_REC, ""))
}
