package dmsnap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/hostcmd"
)

// Program drives device-mapper, and is looked up in PATH. Debian has it in the package
// of that name.
const Program = "dmsetup"

// dmsetupTime is how long one dmsetup may take.
const dmsetupTime = 30 * time.Second

// The commands. Without udev, dmsetup neither waits for it nor needs it: the node that
// is used, /dev/dm-N, the kernel makes itself.

func createArgv(name string) []string {
	return []string{Program, "create", "--noudevrules", "--noudevsync", "--uuid", name, name}
}

func removeArgv(name string) []string {
	return []string{Program, "remove", "--noudevrules", "--noudevsync", name}
}

func statusArgv(name string) []string {
	// Without --noflush the question would wait for writes that are under way.
	return []string{Program, "status", "--noflush", name}
}

// table is the device's, for the standard input of create: store and tail are
// MAJOR:MINOR of loop devices. P is a store that stays, O one that is not given up
// when it is full. See Documentation/admin-guide/device-mapper/snapshot.rst in the
// kernel's source.
func (h header) table(base, store, tail string) string {
	image := h.Image.Size / sector
	text := fmt.Sprintf("0 %d snapshot %s %s PO %d\n", image, base, store, chunk/sector)
	if h.tailSize() > 0 {
		text += fmt.Sprintf("%d %d linear %s 0\n", image, h.tailSize()/sector, tail)
	}
	return text
}

// dmsetup runs one, and says what went wrong in one line, with the errno.
func dmsetup(ctx context.Context, argv []string, input string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, dmsetupTime)
	defer cancel()
	out, err := hostcmd.Run(ctx, hostcmd.Command{Argv: argv, Stdin: strings.NewReader(input)})
	var failed *hostcmd.Error
	if errors.As(err, &failed) && failed.ExitCode > 0 {
		err = explain(argv[1], failed.Stderr, err)
	}
	return string(out), err
}

// explain finds the line that says why: dmsetup's last one is always "Command failed."
func explain(verb, stderr string, err error) error {
	for text := range strings.Lines(stderr) {
		text = strings.TrimPrefix(strings.TrimSpace(text), "device-mapper: ")
		for _, errno := range []unix.Errno{
			unix.EBUSY, unix.ENXIO, unix.ENODEV, unix.ENOENT, unix.EEXIST, unix.EINVAL, unix.EACCES, unix.EPERM,
			unix.ENOSPC, unix.ENOMEM, unix.EIO,
		} {
			// dmsetup says what strerror says, which Go says in lower case.
			if before, ok := cutSuffixFold(text, ": "+errno.Error()); ok {
				return fmt.Errorf("dmsetup %s: %q: %w", verb, before, errno)
			}
		}
	}
	return err
}

func cutSuffixFold(s, suffix string) (before string, ok bool) {
	at := len(s) - len(suffix)
	if at < 0 || !strings.EqualFold(s[at:], suffix) {
		return s, false
	}
	return s[:at], true
}

// find returns the kernel's name of a device, "dm-3", or nothing.
func find(name string) (string, error) {
	devices, err := listDevices(name)
	if err != nil {
		return "", err
	}
	return devices[name], nil
}

// listDevices returns the devices whose names begin with prefix, and the kernel's
// names of them.
func listDevices(prefix string) (map[string]string, error) {
	entries, err := os.ReadDir(sysBlock)
	if err != nil {
		return nil, err
	}
	devices := make(map[string]string)
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "dm-") {
			continue
		}
		if name := line(filepath.Join(sysBlock, e.Name(), "dm/name")); name != "" && strings.HasPrefix(name, prefix) {
			devices[name] = e.Name()
		}
	}
	return devices, nil
}

// node is the path of a device's node. The kernel makes it, where /dev is a devtmpfs.
func node(kernelName string) (string, error) {
	path := "/dev/" + kernelName
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", fmt.Errorf("the device has no node: %w", &fs.PathError{Op: "stat", Path: path, Err: err})
	}
	want := line(filepath.Join(sysBlock, kernelName, "dev"))
	is := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	if st.Mode&unix.S_IFMT != unix.S_IFBLK || is != want {
		return "", fmt.Errorf("%s is not the device %s", path, want)
	}
	return path, nil
}

// dmDir is where dmsetup makes nodes with the devices' own names.
const dmDir = "/dev/mapper"

// removeDevice removes a device. One that is in use is tried again until it is not. ctx
// ends the trying, not the dmsetup that is at it.
func removeDevice(ctx context.Context, name string) error {
	return poll(ctx, func() (bool, error) {
		device, err := find(name)
		if err != nil {
			return false, err
		}
		if device == "" {
			// A dmsetup that was killed may have left the node.
			return true, removeFile(filepath.Join(dmDir, name))
		}
		_, err = dmsetup(context.WithoutCancel(ctx), removeArgv(name), "")
		if errors.Is(err, unix.EBUSY) || absent(err) {
			return false, nil
		}
		return err == nil, err
	}, "the device "+name+" is")
}

// ready says what this host lacks.
func ready() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("device-mapper is root's alone: %w", unix.EPERM)
	}
	if _, err := hostcmd.LookPath(Program); err != nil {
		return err
	}
	// The open loads the module where there is one.
	f, err := os.OpenFile(filepath.Join(dmDir, "control"), os.O_RDWR, 0)
	if err == nil {
		return f.Close()
	}
	if errors.Is(err, fs.ErrNotExist) {
		if _, serr := os.Stat("/sys/class/misc/device-mapper"); serr == nil {
			return nil // dmsetup makes the node
		}
	}
	return fmt.Errorf("this kernel has no device-mapper (module dm_mod): %w", err)
}

// Status is how a snapshot does. Sizes are in bytes.
type Status struct {
	Used, Total int64 // of the store; 0 when the kernel does not say
	// Overflow: the store is full, and writes fail.
	Overflow bool
	// Invalid: a write to the store failed, and the kernel has given it up.
	Invalid bool
}

// parseStatus reads what dmsetup status prints of a device.
func parseStatus(text string) (Status, error) {
	for row := range strings.Lines(text) {
		words := strings.Fields(row)
		if len(words) < 4 || words[2] != "snapshot" {
			continue
		}
		switch words[3] {
		case "Invalid":
			return Status{Invalid: true}, nil
		case "Overflow":
			return Status{Overflow: true}, nil
		}
		used, total, ok := strings.Cut(words[3], "/")
		if ok {
			u, uerr := sectors(used)
			t, terr := sectors(total)
			if uerr == nil && terr == nil {
				return Status{Used: u, Total: t}, nil
			}
		}
		return Status{}, fmt.Errorf("dmsetup says %q of the snapshot", words[3])
	}
	return Status{}, fmt.Errorf("dmsetup says nothing of a snapshot: %q", text)
}

// sectors reads a number of sectors as bytes.
func sectors(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err == nil && (n < 0 || n > maxSize/sector) {
		err = strconv.ErrRange
	}
	return n * sector, err
}
