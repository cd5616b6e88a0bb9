// Package fcproc runs guests in Firecracker, in the jail that its jailer makes: a chroot,
// a uid of the VM's own, Firecracker's seccomp filters. It needs root and a KVM that runs
// stock kernels.
//
//	Confine  vms/ID/run/jail/firecracker/ID/root, a tree like vms/ID itself: what the
//	         guest boots from by hard links, a block device by a node of its own
//	Command  jailer, which makes /dev in the tree, gives up its rights and becomes
//	         Firecracker; the shim has put it into the VM's control group before
//	Boot     the calls of the API, of which the last starts the guest
//	Free     removes the tree: the jailer leaves it, and Firecracker its sockets
//
// All paths that either is given are relative, so copies of one VM can run side by side.
// What both say goes to standard output, with the guest's console, which the shim bounds.
package fcproc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"banger/internal/daemon/check"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/hostcmd"
	"banger/internal/daemon/kvm"
)

// Tested is the version that banger is tested with and installs.
const Tested = "1.12.1"

// The programs' names. The jailer demands that the first has "firecracker" in it.
const (
	firecracker = "firecracker"
	jailer      = "jailer"
)

// VMM is a driver.VMM. Make it with New.
type VMM struct {
	dirs []string

	mu     sync.Mutex
	probed *setup
}

// setup is what Probe found.
type setup struct {
	Firecracker, Jailer string // absolute paths
	Version             string
}

// New makes the driver. The two programs are looked for together in each of dirs, and
// then in PATH. It does nothing before Probe.
func New(dirs ...string) *VMM { return &VMM{dirs: dirs} }

// Name is "firecracker".
func (v *VMM) Name() string { return "firecracker" }

// Probe looks for the two programs, root's rights and KVM. The error says what is missing.
func (v *VMM) Probe(ctx context.Context) (driver.Ability, error) {
	s, err := v.probe(ctx)
	if err != nil {
		return driver.Ability{}, err
	}
	v.mu.Lock()
	v.probed = &s
	v.mu.Unlock()
	a := driver.Ability{Accelerator: "kvm", Vsock: true, NoSerials: true}
	if s.Version != Tested {
		a.Reason = "Firecracker " + s.Version + " is untested: banger is tested with " + Tested
	}
	return a, nil
}

func (v *VMM) probe(ctx context.Context) (setup, error) {
	if os.Geteuid() != 0 {
		return setup{}, errors.New("the jail of Firecracker needs root")
	}
	if why := kvm.Look(false).Missing(); why != "" {
		return setup{}, fmt.Errorf("firecracker needs KVM: %s", why)
	}
	return v.programs(ctx)
}

// programs finds both and asks them for their version.
func (v *VMM) programs(ctx context.Context) (setup, error) {
	s, err := v.find()
	if err != nil {
		return setup{}, err
	}
	if s.Version, err = versionOf(ctx, s.Firecracker, "Firecracker"); err != nil {
		return setup{}, err
	}
	ofJailer, err := versionOf(ctx, s.Jailer, "Jailer")
	if err != nil {
		return setup{}, err
	}
	if ofJailer != s.Version {
		return setup{}, fmt.Errorf("%s is of version %s and %s of %s", s.Firecracker, s.Version, s.Jailer, ofJailer)
	}
	return s, nil
}

// Checks asks for KVM and for the two programs.
func (v *VMM) Checks() []check.Check {
	return []check.Check{
		{
			Name: "kvm", Purpose: "guests in Firecracker",
			Probe: func(context.Context) check.Finding {
				facts := kvm.Look(false)
				if why := facts.Missing(); why != "" {
					return check.Found(check.Fail, "%s", why).WithFix("%s", facts.Remedy())
				}
				return check.Found(check.OK, "%s works", kvm.Device)
			},
		},
		{
			Name: firecracker, Purpose: "runs the guests, in its jail", Fix: "sudo banger setup firecracker",
			Probe: func(ctx context.Context) check.Finding {
				s, err := v.programs(ctx)
				switch {
				case err != nil:
					return check.Found(check.Fail, "%v", err)
				case s.Version != Tested:
					return check.Found(check.Warn, "%s %s is untested: banger is tested with %s", s.Firecracker, s.Version, Tested)
				}
				return check.Found(check.OK, "%s %s", s.Firecracker, s.Version)
			},
		},
	}
}

// find looks for both programs in one place: they are a pair.
func (v *VMM) find() (setup, error) {
	for _, dir := range v.dirs {
		s := setup{Firecracker: filepath.Join(dir, firecracker), Jailer: filepath.Join(dir, jailer)}
		_, err := os.Stat(s.Firecracker)
		_, jerr := os.Stat(s.Jailer)
		switch {
		case err == nil && jerr == nil:
			return s, nil
		case (err == nil) != (jerr == nil):
			return setup{}, fmt.Errorf("%s has one of %s and %s: both are needed", dir, firecracker, jailer)
		}
	}
	var s setup
	for name, path := range map[string]*string{firecracker: &s.Firecracker, jailer: &s.Jailer} {
		found, err := hostcmd.LookPath(name)
		if err == nil {
			found, err = filepath.Abs(found)
		}
		if err != nil {
			return setup{}, fmt.Errorf("%s %w", name, errMissing)
		}
		*path = found
	}
	return s, nil
}

// errMissing is a program that is not there.
var errMissing = errors.New("is not installed on this machine")

// Remedy is a command that may help after an error of Probe.
func Remedy(err error) string {
	switch facts := kvm.Look(false); {
	case errors.Is(err, errMissing):
		return "banger setup firecracker"
	case facts.Missing() != "" && facts.Remedy() != "":
		return facts.Remedy()
	}
	return "banger doctor"
}

var versionLine = regexp.MustCompile(`^(\S+) v(\d+\.\d+\.\d+\S*)$`)

// versionOf runs a program for its version. The first line is like "Firecracker v1.12.1".
func versionOf(ctx context.Context, program, name string) (string, error) {
	out, err := hostcmd.Run(ctx, hostcmd.Command{Argv: []string{program, "--version"}})
	if err != nil {
		return "", fmt.Errorf("cannot ask %s for its version: %w", program, err)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	m := versionLine.FindStringSubmatch(strings.TrimSpace(first))
	if m == nil || m[1] != name {
		return "", fmt.Errorf("%s is no %s: it says %.60q", program, name, first)
	}
	return m[2], nil
}

var errNotProbed = errors.New("the VMM was not probed")

// Command makes the jailer's command line. An error says what of the spec it cannot do.
func (v *VMM) Command(spec driver.Spec) (driver.Command, error) {
	v.mu.Lock()
	s := v.probed
	v.mu.Unlock()
	if s == nil {
		return driver.Command{}, errNotProbed
	}
	if err := validate(spec); err != nil {
		return driver.Command{}, fmt.Errorf("cannot run this VM in Firecracker: %w", err)
	}
	return driver.Command{Argv: argv(spec, *s), Env: []string{"LC_ALL=C.UTF-8"}}, nil
}
