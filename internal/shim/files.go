package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// fileVersion is the version that this release writes. Fields are only ever
// added, so a reader takes any.
const fileVersion = 1

// The files, relative to the VM's directory.
const (
	lockFile      = "run/lock"
	configFile    = "run/shim.json"
	processesFile = "run/processes.json"
	consoleFile   = "log/console"
	consoleOld    = "log/console.1"
	stderrFile    = "log/vmm.stderr"
	exitFile      = "log/exit.json"

	networkStderrFile = "log/network.stderr"
)

// Config is what a shim is told.
type Config struct {
	// Version is set by Launch.
	Version int `json:"version"`
	// Argv is the VMM. Argv[0] with a slash is a path, relative to the VM's
	// directory; without, it is looked up in the PATH of Env, or in the usual
	// system directories when Env has none.
	Argv []string `json:"argv"`
	// Env is complete: nothing is inherited.
	Env []string `json:"env"`
	// Network is the VM's network process, nil for a VM that has none.
	Network *Network `json:"network,omitempty"`
	// Group is the absolute path of a cgroup (version 2) in which the VMM is born, a leaf
	// of the VM's scope. With it the shim is the first process of a PID namespace; its
	// end is the end of all in it, whatever the VMM made of its descriptors and
	// credentials. Empty where the user has no such rights.
	Group string `json:"group,omitempty"`
}

// Process names a process within one boot of the host, as the host counts pids.
type Process struct {
	PID int `json:"pid"`
	// StartTime is field 22 of /proc/PID/stat, clock ticks since the host's boot.
	StartTime uint64 `json:"start_time"`
}

// Supervised is run/processes.json: who runs a VM.
type Supervised struct {
	Version int `json:"version"`
	// BootID is /proc/sys/kernel/random/boot_id of the host.
	BootID string  `json:"boot_id"`
	Shim   Process `json:"shim"`
	// VMM is zero while the shim has not started it yet.
	VMM Process `json:"vmm"`
	// Net is the network process that was started last, zero without one. The shim
	// writes the file again when it has restarted it, if the disk takes it.
	Net Process `json:"net,omitzero"`
}

// How a VMM ended.
const (
	Exited      = "exited"
	Signaled    = "signaled"
	StartFailed = "start-failed"
)

// Exit is log/exit.json: how the last run ended.
type Exit struct {
	Version int    `json:"version"`
	How     string `json:"how"`
	// Code is the exit code when How is Exited.
	Code int `json:"code"`
	// Signal is a name like "KILL" when How is Signaled.
	Signal string `json:"signal,omitempty"`
	// OutOfMemory: the signal was the kernel's, because the VMM's group had no more.
	OutOfMemory bool `json:"out_of_memory,omitempty"`
	// Error says why when How is StartFailed.
	Error string    `json:"error,omitempty"`
	At    time.Time `json:"at"`
	// Intent is the guest's last word on its end: "poweroff", "reboot", "halt",
	// "failed" when its init could not boot, or empty when it had none.
	Intent string `json:"intent,omitempty"`
	// Console holds the last lines of the console, at most 20 of 512 bytes, without
	// control characters. They are the guest's: data, not truth.
	Console []string `json:"console,omitempty"`
	// Stderr is the end of the VMM's standard error, at most 4 KiB.
	Stderr string `json:"stderr,omitempty"`
}

// Held tells whether the VM of dir runs, or is about to, or its end is being
// written down, or its memory is still being given back: the lock is held, or else a
// process is left in the scope of the group that run/shim.json names. Without these
// files it does not run. It takes no lock itself and may be called at any time by
// anybody who can read the files.
func Held(dir string) (bool, error) {
	held, err := locked(dir)
	if err == nil && !held {
		held, err = populated(dir)
	}
	if err != nil {
		return false, fmt.Errorf("cannot ask whether the VM runs: %w", err)
	}
	return held, nil
}

func locked(dir string) (bool, error) {
	file, err := os.Open(filepath.Join(dir, lockFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer file.Close()
	lock := wholeFile(syscall.F_WRLCK)
	if err := fcntlLock(file.Fd(), ofdGetLock, &lock); err != nil {
		return false, err
	}
	return lock.Type != syscall.F_UNLCK, nil
}

// Processes reads who supervises the VM of dir. The error wraps fs.ErrNotExist
// when no shim has got that far. It is history unless Held says otherwise, and a
// pid in it is to be trusted only together with its start time.
func Processes(dir string) (Supervised, error) {
	var s Supervised
	if err := readJSON(filepath.Join(dir, processesFile), &s); err != nil {
		return Supervised{}, err
	}
	if s.Version < 1 || s.Shim.PID <= 0 {
		return Supervised{}, fmt.Errorf("cannot understand %s of %s", processesFile, dir)
	}
	return s, nil
}

// ReadExit reads how the last run of the VM of dir ended. The error wraps
// fs.ErrNotExist when it has not ended, or its end was seen by nobody: the shim
// was killed, the host went down, the disk was full. Launch removes it.
func ReadExit(dir string) (Exit, error) {
	var e Exit
	if err := readJSON(filepath.Join(dir, exitFile), &e); err != nil {
		return Exit{}, err
	}
	if e.Version < 1 || e.How == "" {
		return Exit{}, fmt.Errorf("cannot understand %s of %s", exitFile, dir)
	}
	return e, nil
}

func readJSON(path string, into any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("cannot understand %s: %w", path, err)
	}
	return nil
}

// writeJSON replaces path as one step. With sync, what is there after a power cut
// is the old file or the whole new one.
func writeJSON(path string, from any, sync bool) error {
	data, err := json.Marshal(from)
	if err != nil {
		return err
	}
	temp := path + ".new"
	file, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(append(data, '\n'))
	if err == nil && sync {
		err = file.Sync()
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp)
	}
	return err
}

// The commands of OFD locks, see <asm-generic/fcntl.h>; package syscall lacks them.
const (
	ofdGetLock = 36
	ofdSetLock = 37
)

func wholeFile(kind int16) syscall.Flock_t {
	return syscall.Flock_t{Type: kind, Whence: 0, Start: 0, Len: 0}
}

func fcntlLock(fd uintptr, cmd int, lock *syscall.Flock_t) error {
	for {
		err := syscall.FcntlFlock(fd, cmd, lock)
		if err != syscall.EINTR {
			return err
		}
	}
}

// identify reads the start time of a process that cannot go away meanwhile: the
// caller is it, or is its parent and has not waited for it.
func identify(pid int) (Process, error) {
	path := "/proc/" + strconv.Itoa(pid) + "/stat"
	data, err := os.ReadFile(path)
	if err != nil {
		return Process{}, err
	}
	// Field 2, the name in parentheses, may hold anything: count after it.
	stat := string(data)
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return Process{}, errors.New("cannot understand " + path)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return Process{}, errors.New("cannot understand " + path)
	}
	return Process{PID: pid, StartTime: start}, nil
}

func bootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data)), err
}
