package qemuproc

import (
	"context"

	"banger/internal/config"
	"banger/internal/daemon/check"
)

// Checks asks for QEMU and for KVM.
func Checks(kvm config.KVM) []check.Check {
	return []check.Check{
		{
			Name: "qemu", Purpose: "runs the guests", Fix: Remedy(),
			Probe: func(ctx context.Context) check.Finding {
				s, err := probe(ctx, kvm)
				if err != nil {
					return check.Found(check.Fail, "%v", err)
				}
				if !s.Sandbox {
					return check.Found(check.Warn, "%s %s was built without seccomp: only its uid confines it", s.Program, s.Version)
				}
				return check.Found(check.OK, "%s %s", s.Program, s.Version)
			},
		},
		{
			Name: "kvm", Purpose: "guests at full speed; without it the CPU is emulated, about ten times slower",
			Probe: func(context.Context) check.Finding { return kvmFinding(gatherKVM(kvm)) },
		},
	}
}

func kvmFinding(f kvmFacts) check.Finding {
	accel, reason := accelerator(f)
	if accel == "kvm" {
		return check.Found(check.OK, "%s works", kvmDevice)
	}
	found := check.Found(check.Warn, "%s", reason)
	if f.Off || f.Virt == "" {
		return found
	}
	if !f.Device {
		return found.WithFix("sudo modprobe kvm_%s", map[string]string{"vmx": "intel", "svm": "amd"}[f.Virt])
	}
	if f.Open != nil {
		return found.WithFix("sudo usermod -aG kvm $USER")
	}
	return found
}
