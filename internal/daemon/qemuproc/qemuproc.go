// Package qemuproc is the driver.VMM for QEMU's microvm machine. It starts no VM: it
// looks at the machine once (Probe), turns a spec into an argv (Command), and talks
// to a running QEMU over two Unix sockets below the VM's directory: run/qmp.sock, for
// a moment at a time, and run/agent.sock, the host's end of the guest's serial port.
// Probe comes before Command. QEMU runs in the VM's directory and is given relative
// paths only; its console is its standard output.
//
// KVM is used where it can run a stock kernel, else TCG, which emulates the CPU: see
// accelerator. What the two need of the kernel's command line differs, see kernelArgs.
package qemuproc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"banger/internal/config"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/hostcmd"
	"banger/internal/daemon/kvm"
	"banger/internal/guest/wire"
)

const (
	// ProgramEnv names the environment variable that replaces Program.
	ProgramEnv = "BANGER_QEMU"
	// Program is looked up in PATH. Debian has it in the package qemu-system-x86.
	Program = "qemu-system-x86_64"
	// QMPSocket and AgentSocket are QEMU's sockets, relative to the VM's directory.
	QMPSocket   = "run/qmp.sock"
	AgentSocket = "run/agent.sock"
)

// VMM is QEMU.
type VMM struct {
	kvm config.KVM

	mu     sync.Mutex
	probed *setup // nil before Probe
}

// setup is what Probe found, and all of the machine that Command depends on.
type setup struct {
	Program string // absolute
	Version string
	Accel   string // "kvm" or "tcg"
	Reason  string // why not kvm
	Sandbox bool   // this QEMU has seccomp
	TSC     int64  // kHz, see hostTSC; 0 with KVM
}

// New makes the driver. It does no I/O.
func New(mode config.KVM) *VMM { return &VMM{kvm: mode} }

// Name is "qemu".
func (v *VMM) Name() string { return "qemu" }

// Probe runs QEMU for its version and looks at KVM. Without a QEMU that has the
// microvm machine the error says what is missing; one without the network's back end runs
// VMs that have no network.
func (v *VMM) Probe(ctx context.Context) (driver.Ability, error) {
	s, err := probe(ctx, v.kvm)
	if err != nil {
		return driver.Ability{}, err
	}
	v.mu.Lock()
	v.probed = &s
	v.mu.Unlock()
	why := s.noNetwork()
	return driver.Ability{Accelerator: s.Accel, Reason: s.reason(), Network: why == "", NoNetwork: why}, nil
}

// noNetwork says why VMs get no network card, "" when they do.
func (s setup) noNetwork() string {
	if atLeast(s.Version, streamMajor, streamMinor) {
		return ""
	}
	return fmt.Sprintf("QEMU %s (%s) has no -netdev stream: the network needs %d.%d or newer",
		s.Version, s.Program, streamMajor, streamMinor)
}

func (s setup) reason() string {
	if s.Sandbox {
		return s.Reason
	}
	const note = "this QEMU was built without seccomp: only its uid confines it"
	return strings.TrimPrefix(s.Reason+"; "+note, "; ")
}

func probe(ctx context.Context, mode config.KVM) (setup, error) {
	program, err := findProgram()
	if err != nil {
		return setup{}, err
	}
	s := setup{Program: program, Sandbox: true}
	// A QEMU without seccomp, or of another syntax, refuses the option before it comes
	// to -version.
	out, err := run(ctx, program, "-sandbox", sandbox, "-version")
	if err != nil {
		s.Sandbox = false
		if out, err = run(ctx, program, "-version"); err != nil {
			return setup{}, fmt.Errorf("cannot ask QEMU for its version: %w", err)
		}
	}
	if s.Version, err = parseVersion(out); err != nil {
		return setup{}, fmt.Errorf("%s: %w", program, err)
	}
	machines, err := run(ctx, program, "-machine", "help")
	if err != nil {
		return setup{}, fmt.Errorf("cannot ask QEMU for its machines: %w", err)
	}
	if !hasMachine(machines, "microvm") {
		return setup{}, fmt.Errorf("%s %s was built without the machine microvm", program, s.Version)
	}
	s.Accel = "kvm"
	if s.Reason = kvm.Look(mode == config.KVMOff).Missing(); s.Reason != "" {
		s.Accel = "tcg"
	}
	if s.Accel == "tcg" {
		if s.TSC, err = hostTSC(); err != nil {
			return setup{}, err
		}
	}
	return s, nil
}

// findProgram returns an absolute path.
func findProgram() (string, error) {
	named := os.Getenv(ProgramEnv)
	path, err := hostcmd.LookPath(cmp.Or(named, Program))
	switch {
	case err == nil:
		return filepath.Abs(path)
	case named != "":
		return "", fmt.Errorf("cannot use %s: %w", ProgramEnv, err)
	}
	return "", err
}

// Remedy is the one command that mends what Probe complains about.
func Remedy() string {
	if os.Getenv(ProgramEnv) != "" {
		return "unset " + ProgramEnv
	}
	return hostcmd.Install(hostcmd.PackageOf(Program))
}

func run(ctx context.Context, argv ...string) (string, error) {
	out, err := hostcmd.Run(ctx, hostcmd.Command{Argv: argv})
	return string(out), err
}

var versionLine = regexp.MustCompile(`(?m)^QEMU emulator version (\d+\.\d+(?:\.\d+)*)`)

// parseVersion reads "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)".
func parseVersion(out string) (string, error) {
	m := versionLine.FindStringSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("this is no QEMU: it says %.80q of its version", out)
	}
	return m[1], nil
}

// streamMajor and streamMinor are the version that brought -netdev stream, see
// https://wiki.qemu.org/ChangeLog/7.2.
const (
	streamMajor = 7
	streamMinor = 2
)

// atLeast compares a version of parseVersion.
func atLeast(version string, major, minor int) bool {
	first, rest, _ := strings.Cut(version, ".")
	second, _, _ := strings.Cut(rest, ".")
	x, err1 := strconv.Atoi(first)
	y, err2 := strconv.Atoi(second)
	return err1 == nil && err2 == nil && (x > major || x == major && y >= minor)
}

// hasMachine reads the table of "-machine help": a name, spaces, a description.
func hasMachine(out, name string) bool {
	for line := range strings.Lines(out) {
		if first, _, _ := strings.Cut(line, " "); first == name {
			return true
		}
	}
	return false
}

var errNotProbed = errors.New("the VMM was not probed")

// Confine has nothing to make: QEMU is its own sandbox.
func (v *VMM) Confine(context.Context, string, driver.Spec) error { return nil }

// Free has nothing to remove: what QEMU leaves lies in run/.
func (v *VMM) Free(context.Context, string) error { return nil }

// Ending has no words: QEMU knows 0 and 1.
func (v *VMM) Ending(int) string { return "" }

// Command makes QEMU's command line. An error says what of the spec it cannot do.
func (v *VMM) Command(spec driver.Spec) (driver.Command, error) {
	v.mu.Lock()
	s := v.probed
	v.mu.Unlock()
	if s == nil {
		return driver.Command{}, errNotProbed
	}
	args, err := argv(spec, *s)
	if err != nil {
		return driver.Command{}, fmt.Errorf("cannot run this VM in QEMU: %w", err)
	}
	return driver.Command{Argv: args, Env: []string{"LC_ALL=C.UTF-8"}}, nil
}

// Channel reaches the agent over the guest's virtio-serial port. QEMU takes one
// connection at a time: there must be one Channel per VM.
func (v *VMM) Channel(dir string, magic []byte) driver.Channel {
	dial := func(ctx context.Context) (net.Conn, error) { return wire.DialUnix(ctx, dir, AgentSocket) }
	return wire.NewSerial(dial, magic)
}
