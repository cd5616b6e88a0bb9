package vm

import (
	"context"
	"fmt"
	"strconv"

	"banger/internal/daemon/store"
)

// The uids of jailed VMMs lie above those of subordinate ids and of systemd (see UIDS-GIDS
// in systemd's documentation) and below 2^31: a block for each instance, in it one uid for
// each slot.
const (
	firstJailUID = 1879048192 // 0x7000_0000
	jailBlock    = 1 << 12
	jailBlocks   = 1 << 16
)

// jailUser is the uid and the gid of the VMM of rec, 0 where VMs are not jailed. Two
// instances of one host share a block once in 65,536 pairs.
func (m *Manager) jailUser(rec store.VM) int {
	if m.host.Groups == nil {
		return 0
	}
	id, err := strconv.ParseUint(m.instance, 16, 32)
	if err != nil {
		return 0 // which no jail takes
	}
	return firstJailUID + int(id%jailBlocks)*jailBlock + rec.Slot
}

// jail: what the VMM's process finds around it.

func (m *Manager) acquireJail(ctx context.Context, v *machine) error {
	if m.host.Groups != nil && v.rec.Slot >= jailBlock {
		return fmt.Errorf("there are uids for %d VMs", jailBlock-1)
	}
	return m.host.VMM.Confine(ctx, v.dir.Path(), m.spec(v))
}

func (m *Manager) releaseJail(ctx context.Context, v *machine) error {
	return m.host.VMM.Free(ctx, v.dir.Path())
}
