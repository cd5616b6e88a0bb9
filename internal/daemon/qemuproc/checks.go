package qemuproc

import (
	"context"

	"banger/internal/config"
	"banger/internal/daemon/check"
	"banger/internal/daemon/kvm"
)

// Checks asks for QEMU and for KVM.
func Checks(mode config.KVM) []check.Check {
	return []check.Check{
		{
			Name: "qemu", Purpose: "runs the guests", Fix: Remedy(),
			Probe: func(ctx context.Context) check.Finding {
				s, err := probe(ctx, mode)
				if err != nil {
					return check.Found(check.Fail, "%v", err)
				}
				if why := s.noNetwork(); why != "" {
					return check.Found(check.Warn, "VMs have no network: %s", why).WithFix("export %s=/path/of/a/newer/%s", ProgramEnv, Program)
				}
				if !s.Sandbox {
					return check.Found(check.Warn, "%s %s was built without seccomp: only its uid confines it", s.Program, s.Version)
				}
				return check.Found(check.OK, "%s %s", s.Program, s.Version)
			},
		},
		{
			Name: "kvm", Purpose: "guests at full speed; without it the CPU is emulated, about ten times slower",
			Probe: func(context.Context) check.Finding { return kvmFinding(kvm.Look(mode == config.KVMOff)) },
		},
	}
}

func kvmFinding(f kvm.Facts) check.Finding {
	if why := f.Missing(); why != "" {
		return check.Found(check.Warn, "%s", why).WithFix("%s", f.Remedy())
	}
	return check.Found(check.OK, "%s works", kvm.Device)
}
