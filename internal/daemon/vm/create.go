package vm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"banger/api"
	"banger/internal/config"
	"banger/internal/daemon/opstate"
	"banger/internal/daemon/store"
	"banger/internal/netwire"
)

// CreateRequest asks for a VM.
type CreateRequest struct {
	Name            string // empty: generated, from NameHint when that is set
	NameHint        string
	Image           string
	Kernel          string // empty: the image's
	CPUs            int
	Memory          int64 // bytes
	Disk            int64 // bytes
	NoStart         bool
	RemoveOnRelease bool
	ReadyAgent      bool // done when the agent answers, not when the system is ready
	Repository      string
	User            store.User
	Owner           int // uid
	Network         netwire.Network
	DefaultPreset   bool // its preset is nobody's wish
	// Reserved, unless nil, is told the record as soon as its name is taken.
	Reserved func(store.VM)
}

// Validate checks what can be checked before anything is begun.
func (m *Manager) Validate(ctx context.Context, r CreateRequest) error {
	if r.Name != "" {
		if err := config.ValidateName(r.Name); err != nil {
			return hinted(err, "banger create --help")
		}
	}
	for _, err := range []error{config.ValidateCPUs(r.CPUs), config.ValidateMemory(r.Memory), config.ValidateDisk(r.Disk)} {
		if err != nil {
			return hinted(err, "banger create --help")
		}
	}
	if most := m.ability.MaxCPUs; most > 0 && r.CPUs > most {
		return api.Errorf(api.Invalid, "%d cpus are more than the %d that %s takes", r.CPUs, most, m.host.VMM.Name()).
			WithHint("banger create --cpus %d", min(most, m.limits.CPUs))
	}
	if r.CPUs > m.limits.CPUs {
		return api.Errorf(api.Invalid, "%d cpus are more than the host's %d", r.CPUs, m.limits.CPUs).
			WithHint("banger create --cpus %d", m.limits.CPUs)
	}
	if r.Memory > m.limits.Memory {
		return api.Errorf(api.Invalid, "%s of memory are more than the host's %s", config.FormatSize(r.Memory), config.FormatSize(m.limits.Memory)).
			WithHint("banger create --memory %s", config.FormatSize(max(m.limits.Memory/2>>20<<20, config.MinMemory)))
	}
	network, err := canonicalNetwork(r.Network)
	if err != nil {
		return err
	}
	preset := network.Preset
	if r.DefaultPreset {
		preset = ""
	}
	// Also who writes only what is denied takes it that there is a network.
	if err := m.refuseNetwork(preset, slices.Concat(network.Allow, network.Deny), network.Publish); err != nil {
		return err
	}
	if err := m.checkTaken(ctx, r); err != nil || r.NoStart || m.programs.Net == "" {
		return err
	}
	return m.tryPorts(ctx, "", network.Publish, createHints())
}

// checkTaken says early what reserve would say after a pull of minutes.
func (m *Manager) checkTaken(ctx context.Context, r CreateRequest) error {
	vms, err := m.store.VMs(ctx)
	if err != nil {
		return err
	}
	for _, v := range vms {
		if r.Name != "" && v.Name == r.Name {
			return nameTaken(v.Name)
		}
		if r.Repository != "" && v.Repository == r.Repository {
			return api.Errorf(api.Exists, "the repository has a VM already: %s", v.Name).WithHint("banger show %s", v.Name)
		}
	}
	return nil
}

// hinted adds a hint to an error that has none.
func hinted(err error, hint string) error {
	if api.HintOf(err) != "" {
		return err
	}
	return &api.Error{Code: api.CodeOf(err), Message: err.Error(), Hint: hint, Err: err}
}

func nameTaken(name string) error {
	return api.Errorf(api.Exists, "a VM named %s exists", name).WithHint("banger show %s", name)
}

// Create makes a VM and, unless r says otherwise, starts it. When it fails or is
// cancelled nothing of the VM is left.
func (m *Manager) Create(ctx context.Context, r CreateRequest, p Progress) (store.VM, error) {
	rec, err := m.create(ctx, r, p)
	if err != nil {
		return rec, m.wrap("create", r.displayName(rec), err)
	}
	return rec, nil
}

func (r CreateRequest) displayName(rec store.VM) string {
	for _, name := range []string{rec.Name, r.Name, r.NameHint} {
		if name != "" {
			return name
		}
	}
	return "the VM"
}

func (m *Manager) create(ctx context.Context, r CreateRequest, p Progress) (store.VM, error) {
	image, err := m.images.Ensure(ctx, r.Image, p)
	if err != nil {
		return store.VM{}, err
	}
	if r.Kernel == "" {
		r.Kernel = image.Kernel
	}
	kernel, err := m.images.EnsureKernel(ctx, r.Kernel, p)
	if err != nil {
		return store.VM{}, err
	}
	// A pull of the kernel takes a while: the image may have been replaced meanwhile.
	if image, err = m.images.Ensure(ctx, r.Image, p); err != nil {
		return store.VM{}, err
	}
	if r.Disk < image.Size {
		return store.VM{}, api.Errorf(api.Invalid, "a disk of %s is smaller than image %s, which has %s",
			config.FormatSize(r.Disk), image.Name, config.FormatSize(image.Size)).WithHint("banger create --disk %s", config.FormatSize(image.Size))
	}

	id := newID()
	ctx, end, err := m.begin(ctx, id, opstate.VerbCreate, p)
	if err != nil {
		return store.VM{}, err
	}
	defer end()
	rec, err := m.reserve(ctx, id, r, image, kernel)
	if err != nil {
		return rec, err
	}
	if r.Reserved != nil {
		r.Reserved(rec)
	}
	v := &machine{rec: rec, image: image, kernel: kernel, dir: m.layout.VM(id), creating: true}
	if err := m.make(ctx, v, r, p); err != nil {
		undo, cancel := undoContext(ctx)
		defer cancel()
		return v.rec, errors.Join(err, m.destroy(undo, v, "undo"))
	}
	if r.RemoveOnRelease {
		m.leases.expect(id)
	}
	return v.rec, nil
}

// make acquires what the reserved VM needs, and starts it.
func (m *Manager) make(ctx context.Context, v *machine, r CreateRequest, p Progress) error {
	total := len(m.rows(scopeVM))
	if !r.NoStart {
		total += m.startSteps(r.ReadyAgent)
	}
	s := m.steps("create", p, total)
	err, stuck := m.acquireAll(ctx, v, scopeVM, s)
	if err != nil || stuck != nil {
		return errors.Join(err, stuck)
	}
	driver := v.rec.DiskDriver
	err = m.transition(ctx, v, store.Stopped, func(rec *store.VM) { rec.DiskDriver = driver })
	if err != nil || r.NoStart {
		return err
	}
	return m.boot(ctx, v, r.ReadyAgent, false, s)
}

// reserve inserts the record: it is what makes name, slot and repository taken.
func (m *Manager) reserve(ctx context.Context, id string, r CreateRequest, image store.Image, kernel store.Kernel) (store.VM, error) {
	network, err := canonicalNetwork(r.Network)
	if err != nil {
		return store.VM{}, err
	}
	machineID := make([]byte, 16)
	rand.Read(machineID)
	rec := store.VM{
		ID: id, State: store.Creating, ImageID: image.ID, Kernel: kernel.Name,
		CPUs: r.CPUs, Memory: r.Memory, Disk: r.Disk, MachineID: hex.EncodeToString(machineID),
		User: r.User, Owner: r.Owner, RemoveOnRelease: r.RemoveOnRelease, Repository: r.Repository,
		CreatedAt: time.Now().UTC(), Network: network,
	}
	m.createMu.Lock()
	defer m.createMu.Unlock()
	vms, err := m.store.VMs(ctx)
	if err != nil {
		return rec, err
	}
	taken := make(map[string]bool, len(vms))
	for _, v := range vms {
		taken[v.Name] = true
	}
	if rec.Name, err = chooseName(r.Name, r.NameHint, taken); err != nil {
		return rec, err
	}
	if rec.Slot, err = m.store.FreeSlot(ctx); err != nil {
		return rec, err
	}
	err = m.store.InsertVM(ctx, rec)
	var exists *store.ExistsError
	if errors.As(err, &exists) && exists.What == "repository" {
		return rec, api.Errorf(api.Exists, "the repository has a VM already").WithHint("banger ps")
	}
	return rec, err
}

// chooseName takes the name as asked for, else the first free one of hint, hint-2,
// hint-3 …, else a free random one.
func chooseName(name, hint string, taken map[string]bool) (string, error) {
	if name != "" {
		if taken[name] {
			return "", nameTaken(name)
		}
		return name, nil
	}
	if hint != "" {
		base := config.NameFrom(hint)
		for n := 1; n <= len(taken)+1; n++ {
			if candidate := config.Numbered(base, n); !taken[candidate] {
				return candidate, nil
			}
		}
	}
	for range 1000 {
		if candidate := config.RandomName(); !taken[candidate] {
			return candidate, nil
		}
	}
	return "", fmt.Errorf("cannot find a free name")
}

// newID makes an id of 12 lower-case hex digits.
func newID() string {
	b := make([]byte, 6)
	rand.Read(b)
	return hex.EncodeToString(b)
}
