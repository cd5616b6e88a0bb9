package daemon

import (
	"context"
	"os"

	"banger/api"
	"banger/internal/config"
	"banger/internal/daemon/cgroup"
	"banger/internal/daemon/check"
	"banger/internal/daemon/dmsnap"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/fcproc"
	"banger/internal/daemon/rootdisk"
)

// wireSystem is wireHost for the system's daemon: Firecracker in a jail.
func (d *Daemon) wireSystem(ctx context.Context) (driver.Host, driver.Ability, error) {
	vmm := fcproc.New(firecrackerDirs(d.layout)...)
	ability, err := vmm.Probe(ctx)
	if err != nil {
		return driver.Host{}, ability, api.Errorf(api.NotReady, "%w", err).WithHint("%s", fcproc.Remedy(err))
	}
	groups := cgroup.New(d.instance)
	d.onClose(func() error { groups.Close(); return nil })
	if err := groups.Probe(ctx); err != nil {
		return driver.Host{}, ability, api.Errorf(api.NotReady, "%w", err).WithHint("banger doctor")
	}
	snapshot := dmsnap.New(d.instance)
	choice, err := rootdisk.Choose(ctx, d.layout.Root, d.config.DiskDriver, systemDisks(snapshot))
	if err != nil {
		return driver.Host{}, ability, api.Errorf(api.NotReady, "%w", err).WithHint("banger doctor")
	}
	d.notePassed(choice)
	return driver.Host{
		VMM: vmm, Disk: choice.Disk, Groups: groups,
		OtherDisks:  []driver.Disk{rootdisk.NewReflink(), snapshot, rootdisk.NewCopy()},
		Inventories: append(dmsnap.Inventories(d.instance, d.layout.Root), groups.Inventory()),
	}, ability, nil
}

// firecrackerDirs are the places where firecracker and jailer may be, the first that has
// them first.
func firecrackerDirs(l config.Layout) []string {
	dirs := []string{l.Firecracker()}
	if named := os.Getenv(fcproc.DirEnv); named != "" {
		dirs = append([]string{named}, dirs...)
	}
	return dirs
}

// systemDisks are the ways to make disks for Firecracker.
func systemDisks(snapshot *dmsnap.Disk) []rootdisk.Candidate {
	return rootdisk.RawOnly(rootdisk.Candidate{Disk: snapshot, Probe: snapshot.Probe})
}

// systemChecks is what the system's daemon needs of a machine.
func systemChecks(l config.Layout, c config.Config) []check.Check {
	instance, err := l.Instance()
	checks := fcproc.New(firecrackerDirs(l)...).Checks()
	checks = append(checks, check.Check{
		Name: "control groups", Purpose: "VMs that outlive the daemon, and their limits",
		Probe: func(ctx context.Context) check.Finding {
			if err == nil {
				err = cgroup.New(instance).Probe(ctx)
			}
			if err != nil {
				return check.Found(check.Fail, "%v", err)
			}
			return check.Found(check.OK, "cgroup v2 with systemd")
		},
	})
	return append(checks, rootdisk.Checks(l.Root, c.DiskDriver, systemDisks(dmsnap.New(instance)))...)
}
