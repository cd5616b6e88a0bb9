package vm

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"banger/internal/config"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/proc"
	"banger/internal/daemon/store"
)

// handlesVersion is the version of handles.json. A daemon reads all earlier ones.
const handlesVersion = 1

// Handles are what a running VM holds on the host right now. They live in the
// handle cache and in run/handles.json, never in SQLite: all of it dies with the
// host's boot and can be derived or found again.
type Handles struct {
	Version int `json:"version"`
	// BootID is the host's boot in which these were taken.
	BootID   string           `json:"boot_id"`
	Attached *driver.Attached `json:"attached,omitempty"`
	Shim     *proc.Identity   `json:"shim,omitempty"`
	VMM      *proc.Identity   `json:"vmm,omitempty"`
	// Magic opens the guest channel of this boot of the guest.
	Magic []byte `json:"magic,omitempty"`
	// GuestBootID and User are what the agent said of itself.
	GuestBootID string `json:"guest_boot_id,omitempty"`
	User        string `json:"user,omitempty"`
}

// machine is one VM in the hands of the operation that holds its slot.
type machine struct {
	rec      store.VM
	image    store.Image
	kernel   store.Kernel
	dir      config.VMDir
	h        Handles
	channel  driver.Channel
	creating bool // by the operation that works on it
	// jobHangs: a workspace job on it was waited for in vain.
	jobHangs bool
}

// handleCache holds the handles and the guest channel of each running VM. Its
// mutex is a leaf.
type handleCache struct {
	mu sync.Mutex
	// entries holds copies: an operation changes its machine, then puts it.
	entries map[string]entry
}

type entry struct {
	handles Handles
	channel driver.Channel
	// lost says why the handles of a VM that runs could not be read.
	lost string
}

func newHandleCache() *handleCache {
	return &handleCache{entries: make(map[string]entry)}
}

func (c *handleCache) put(id string, e entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entries[id] = e
}

func (c *handleCache) get(id string) (entry, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[id]
	return e, ok
}

func (c *handleCache) drop(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.entries, id)
}

// all returns the ids of the VMs that hold something.
func (c *handleCache) all() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	ids := make([]string, 0, len(c.entries))
	for id := range c.entries {
		ids = append(ids, id)
	}
	return ids
}

// saveHandles records what v holds now.
func (m *Manager) saveHandles(v *machine) error {
	v.h.Version, v.h.BootID = handlesVersion, m.bootID
	m.cache.put(v.rec.ID, entry{handles: v.h, channel: v.channel})
	if err := writeJSON(v.dir.Handles(), v.h); err != nil {
		return fmt.Errorf("cannot write handles: %w", err)
	}
	return nil
}

// readHandles reads handles.json. Those of another boot of the host, or of no
// known version, are an error: nothing they name can be trusted.
func (m *Manager) readHandles(dir config.VMDir) (Handles, error) {
	var h Handles
	data, err := os.ReadFile(dir.Handles())
	if err != nil {
		return h, err
	}
	if err := json.Unmarshal(data, &h); err != nil {
		return Handles{}, fmt.Errorf("cannot read %s: %w", dir.Handles(), err)
	}
	if h.Version < 1 || h.Version > handlesVersion {
		return Handles{}, fmt.Errorf("cannot read %s: unknown version %d", dir.Handles(), h.Version)
	}
	if h.BootID != m.bootID {
		return Handles{}, fmt.Errorf("handles of an earlier boot of the host")
	}
	return h, nil
}

// writeJSON replaces path at once: readers see the old file or the new one.
// It does not sync; what must survive a power loss lies in SQLite.
func writeJSON(path string, value any) error {
	data, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	temp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = temp.Write(append(data, '\n'))
	if cerr := temp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(temp.Name(), path)
	}
	if err != nil {
		os.Remove(temp.Name())
	}
	return err
}
