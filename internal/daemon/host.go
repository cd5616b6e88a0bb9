package daemon

import (
	"context"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
	"banger/internal/daemon/check"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/hostcmd"
	"banger/internal/daemon/imagemgr"
	"banger/internal/daemon/qemuproc"
	"banger/internal/daemon/rootdisk"
)

// wireHost decides once, by probing, which drivers this daemon uses.
func (d *Daemon) wireHost(ctx context.Context, o options) (driver.Host, driver.Ability, error) {
	if o.host != nil {
		ability, err := o.host.VMM.Probe(ctx)
		return *o.host, ability, err
	}
	if d.system {
		return d.wireSystem(ctx)
	}
	vmm := qemuproc.New(d.config.KVM)
	ability, err := vmm.Probe(ctx)
	if err != nil {
		return driver.Host{}, ability, api.Errorf(api.NotReady, "%w", err).WithHint("%s", qemuproc.Remedy())
	}
	choice, err := rootdisk.Choose(ctx, d.layout.Root, d.config.DiskDriver, rootdisk.UserMode())
	if err != nil {
		return driver.Host{}, ability, api.Errorf(api.NotReady, "%w", err).WithHint("banger doctor")
	}
	d.notePassed(choice)
	return driver.Host{
		VMM: vmm, Disk: choice.Disk,
		OtherDisks: []driver.Disk{rootdisk.NewReflink(), rootdisk.NewQCOW2(), rootdisk.NewCopy()},
	}, ability, nil
}

func (d *Daemon) notePassed(choice rootdisk.Choice) {
	for _, r := range choice.Passed {
		d.log.Info("a cheaper way to make disks does not work here", "driver", r.Driver, "why", r.Why)
	}
}

// Doctor looks at this machine without a daemon: it works when none can start.
func Doctor(ctx context.Context, opts ...Option) []*bangerv1.Check {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	return runChecks(ctx, hostChecks(o))
}

// hostChecks is what banger needs of a machine.
func hostChecks(o options) []check.Check {
	layout := o.layout
	if layout == nil {
		if l, err := config.Dir(); err == nil {
			layout = &l
		}
	}
	c, err := loadConfig()
	checks := []check.Check{{
		Name: "configuration", Purpose: "defaults of new VMs",
		Probe: func(context.Context) check.Finding {
			if err != nil {
				return check.Found(check.Fail, "%v", err).WithFix("%s", api.HintOf(err))
			}
			return check.Found(check.OK, "new VMs get %d cpus, %s of memory, image %s", c.CPUs, config.FormatSize(c.Memory), c.Image)
		},
	}}
	git := check.Check{
		Name: "git", Purpose: "repositories in VMs: up, diff, apply",
		Probe: func(context.Context) check.Finding {
			path, err := hostcmd.LookPath("git")
			if err != nil {
				return check.Found(check.Fail, "%v", err).WithFix("%s", hostcmd.Install("git"))
			}
			return check.Found(check.OK, "%s", path)
		},
	}
	if layout != nil && layout.IsSystem() {
		checks = append(append(checks, git), systemChecks(*layout, c)...)
		return append(checks, imagemgr.Checks(layout.Root)...)
	}
	checks = append(append(checks, qemuproc.Checks(c.KVM)...), git)
	if layout != nil {
		checks = append(checks, rootdisk.Checks(layout.Root, c.DiskDriver, rootdisk.UserMode())...)
		checks = append(checks, imagemgr.Checks(layout.Root)...)
	}
	return checks
}

func runChecks(ctx context.Context, checks []check.Check) []*bangerv1.Check {
	var lines []*bangerv1.Check
	for _, o := range check.Run(ctx, checks) {
		line := &bangerv1.Check{Name: o.Name, Purpose: o.Purpose, Finding: o.Finding, Fix: o.Fix}
		switch o.Result {
		case check.OK:
			line.Result = bangerv1.Check_OK
		case check.Warn:
			line.Result = bangerv1.Check_WARN
		case check.Fail:
			line.Result = bangerv1.Check_FAIL
		default:
			line.Result = bangerv1.Check_UNKNOWN
		}
		lines = append(lines, line)
	}
	return lines
}
