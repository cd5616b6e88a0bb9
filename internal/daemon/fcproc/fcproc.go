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
	"sync"

	"banger/internal/daemon/check"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/kvm"
)

// VMM is a driver.VMM. Make it with New.
type VMM struct {
	dirs []string

	mu     sync.Mutex
	probed *setup
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
	a := driver.Ability{Accelerator: "kvm", Vsock: true, NoSerials: true, MaxCPUs: maxCPUs}
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
			Name: firecracker, Purpose: "runs the guests, in its jail", Fix: remedyOfPrograms(),
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

var errNotProbed = errors.New("the VMM was not probed")

// Command makes the jailer's command line. An error says what of the spec it cannot do.
func (v *VMM) Command(spec driver.Spec) (driver.Command, error) {
	s, err := v.setup()
	if err != nil {
		return driver.Command{}, err
	}
	if err := validate(spec); err != nil {
		return driver.Command{}, fmt.Errorf("cannot run this VM in Firecracker: %w", err)
	}
	return driver.Command{Argv: argv(spec, s), Env: []string{"LC_ALL=C.UTF-8"}}, nil
}

// setup is what Probe found.
func (v *VMM) setup() (setup, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.probed == nil {
		return setup{}, errNotProbed
	}
	return *v.probed, nil
}
