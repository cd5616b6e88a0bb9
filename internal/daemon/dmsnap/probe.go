package dmsnap

import (
	"context"
	"fmt"
	"os"
)

// Probe says what this host lacks for disks below dir. It makes a loop device there,
// which goes away with it.
func (d *Disk) Probe(ctx context.Context, dir string) error {
	if err := ready(); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		return err
	}
	if err := f.Truncate(chunk); err != nil {
		return err
	}
	loop, err := bind(part{file: f, length: chunk}, "banger-probe")
	if err != nil {
		return err
	}
	loop.Close()
	// It loads the module where there is one.
	if _, err := dmsetup(ctx, []string{Program, "target-version", "snapshot"}, ""); err != nil {
		return fmt.Errorf("this kernel has no snapshots (module dm_snapshot): %w", err)
	}
	return nil
}
