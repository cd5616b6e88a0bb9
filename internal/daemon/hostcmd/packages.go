package hostcmd

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// NotInstalledError is a program that this machine lacks. errors.Is takes it for
// exec.ErrNotFound.
type NotInstalledError struct{ Program string }

func (e *NotInstalledError) Error() string {
	if pkg := PackageOf(e.Program); pkg != e.Program {
		return fmt.Sprintf("%s is not installed (package %s)", e.Program, pkg)
	}
	return e.Program + " is not installed"
}

func (e *NotInstalledError) Unwrap() error { return exec.ErrNotFound }

// PackageOf names the package of Debian and Ubuntu that a program which banger runs
// comes in; that of others is taken to be called as they are.
func PackageOf(program string) string {
	switch program {
	case "qemu-system-x86_64":
		return "qemu-system-x86"
	case "qemu-img":
		return "qemu-utils"
	case "apt-get", "apt-cache", "apt-config":
		return "apt"
	case "dpkg-deb":
		return "dpkg"
	case "depmod":
		return "kmod"
	case "mkfs.ext4", "e2fsck":
		return "e2fsprogs"
	case "unshare":
		return "util-linux"
	case "newuidmap":
		return "uidmap"
	}
	return program
}

// Install is the command that installs packages.
func Install(packages ...string) string {
	command := "apt-get install " + strings.Join(packages, " ")
	if os.Geteuid() == 0 {
		return command // a bare machine has no sudo
	}
	return "sudo " + command
}
