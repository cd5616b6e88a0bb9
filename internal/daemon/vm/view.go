package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"banger/api"
	"banger/internal/daemon/store"
	"banger/internal/netwire"
	"banger/internal/shim"
)

// View is a VM as a user sees it.
type View struct {
	store.VM
	Image     string // by name
	Workspace *store.Workspace
	// ExecUser is the account that exec uses when none is named, empty while the VM
	// does not run: the guest maps names and uids that its image holds.
	ExecUser string
	// Problem says how what the record says and what the host shows differ.
	Problem string
	// Handles are what the running VM holds, for people to read.
	Handles map[string]string
	// Traffic is set by Show while the VM's network runs.
	Traffic *netwire.Stats
}

// List returns all VMs, by name. It asks no guest; a sick VM is listed with
// its problem.
func (m *Manager) List(ctx context.Context) ([]View, error) {
	vms, err := m.store.VMs(ctx)
	if err != nil {
		return nil, err
	}
	images, err := m.imageNames(ctx)
	if err != nil {
		return nil, err
	}
	workspaces, err := m.store.Workspaces(ctx)
	if err != nil {
		return nil, err
	}
	kernels, err := m.store.Kernels(ctx)
	if err != nil {
		return nil, err
	}
	views := make([]View, 0, len(vms))
	for _, v := range vms {
		view := View{VM: v, Image: images[v.ImageID], Problem: cmp.Or(m.problem(ctx, v), m.missingCard(v, kernels))}
		if w, ok := workspaces[v.ID]; ok {
			view.Workspace = &w
		}
		views = append(views, view)
	}
	return views, nil
}

// Show returns one VM with its handles.
func (m *Manager) Show(ctx context.Context, ref string) (View, error) {
	v, err := m.Resolve(ctx, ref, true)
	if err != nil {
		return View{}, err
	}
	images, err := m.imageNames(ctx)
	if err != nil {
		return View{}, err
	}
	kernels, err := m.store.Kernels(ctx)
	if err != nil {
		return View{}, err
	}
	view := View{VM: v, Image: images[v.ImageID], Problem: cmp.Or(m.problem(ctx, v), m.missingCard(v, kernels)), Handles: m.handleText(v.ID)}
	view.Traffic = m.traffic(ctx, v)
	if w, err := m.store.Workspace(ctx, v.ID); err == nil {
		view.Workspace = &w
	}
	if e, ok := m.cache.get(v.ID); ok {
		view.ExecUser = e.handles.User
	}
	return view, nil
}

func (m *Manager) imageNames(ctx context.Context) (map[string]string, error) {
	images, err := m.store.Images(ctx)
	if err != nil {
		return nil, err
	}
	names := make(map[string]string, len(images))
	for _, i := range images {
		names[i.ID] = i.Name
		if i.Name == "" {
			names[i.ID] = i.ID
		}
	}
	return names, nil
}

// problem compares the record with the VM's lock, and asks the disk of one that runs.
func (m *Manager) problem(ctx context.Context, v store.VM) string {
	_, network := networkOf(v)
	if v.State != store.Running {
		return network
	}
	if e, ok := m.cache.get(v.ID); ok && e.lost != "" {
		return e.lost
	}
	held, err := shim.Held(m.layout.VM(v.ID).Path())
	switch {
	case err != nil:
		return fmt.Sprintf("cannot ask its lock: %v", err)
	case !held:
		return "it has ended and is being cleaned up"
	}
	return cmp.Or(m.diskProblem(ctx, v), network)
}

// watchedDisk is a disk driver that can say what is wrong with the disk of a VM that runs.
type watchedDisk interface {
	Problem(ctx context.Context, vm, path string) (string, error)
}

func (m *Manager) diskProblem(ctx context.Context, v store.VM) string {
	disk, err := m.diskNamed(v.DiskDriver)
	if err != nil {
		return err.Error()
	}
	watched, ok := disk.(watchedDisk)
	if !ok {
		return ""
	}
	text, err := watched.Problem(ctx, v.ID, m.layout.VM(v.ID).Disk())
	if err != nil && ctx.Err() == nil && !errors.Is(err, fs.ErrNotExist) { // it has ended meanwhile
		return fmt.Sprintf("cannot ask its disk: %v", err)
	}
	return text
}

// missingCard says that v has no network although its record asks for one: the host's VMM
// has none, or the kernel, pulled by an earlier release, brings the module of the disks and
// not that of the network card.
func (m *Manager) missingCard(v store.VM, kernels []store.Kernel) string {
	if m.programs.Net == "" {
		if n := v.Network; m.ability.NoNetwork != "" && wanted(n.Preset, n.Allow, n.Publish) {
			return "it has no network: " + m.ability.NoNetwork
		}
		return ""
	}
	for _, k := range kernels {
		if k.Name == v.Kernel && hasModule(k, "virtio_blk") && !hasModule(k, "virtio_net") {
			return fmt.Sprintf("it has no network: kernel %s is an earlier release's; banger kernel pull %s, then start the VM again", k.Name, k.Name)
		}
	}
	return ""
}

// hasModule tells whether the initramfs of a kernel brings a module.
func hasModule(k store.Kernel, module string) bool {
	return slices.ContainsFunc(k.Modules, func(file string) bool { return moduleName(file) == module })
}

// moduleName makes "virtio_blk" of "kernel/drivers/block/virtio-blk.ko.zst".
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

func (m *Manager) handleText(id string) map[string]string {
	e, ok := m.cache.get(id)
	if !ok {
		return nil
	}
	text := map[string]string{"directory": m.layout.VM(id).Path()}
	h := e.handles
	if h.Shim != nil {
		text["shim pid"] = strconv.Itoa(h.Shim.PID)
	}
	if h.VMM != nil {
		text["vmm pid"] = strconv.Itoa(h.VMM.PID)
	}
	if h.Attached != nil && h.Attached.Device != "" {
		text["disk device"] = h.Attached.Device
	}
	if h.GuestBootID != "" {
		text["guest boot id"] = h.GuestBootID
	}
	return text
}

// Resolve finds a VM by name, id, or, with prefix, a unique prefix of either. An
// exact name wins.
func (m *Manager) Resolve(ctx context.Context, ref string, prefix bool) (store.VM, error) {
	if ref == "" {
		return store.VM{}, api.Errorf(api.Invalid, "no VM named").WithHint("banger ps")
	}
	vms, err := m.store.VMs(ctx)
	if err != nil {
		return store.VM{}, err
	}
	for _, v := range vms {
		if v.Name == ref {
			return v, nil
		}
	}
	var found []store.VM
	for _, v := range vms {
		if v.ID == ref {
			return v, nil
		}
		if prefix && (strings.HasPrefix(v.Name, ref) || strings.HasPrefix(v.ID, ref)) {
			found = append(found, v)
		}
	}
	switch len(found) {
	case 0:
		if name := prefixOf(vms, ref); name != "" {
			return store.VM{}, api.Errorf(api.NotFound, "no VM named %s; it is a prefix of %s, and this wants the whole name", ref, name).
				WithHint("banger show %s", name)
		}
		return store.VM{}, notFound(ref)
	case 1:
		return found[0], nil
	}
	var names []string
	for _, v := range found {
		names = append(names, v.Name)
	}
	return store.VM{}, api.Errorf(api.Ambiguous, "%s fits several VMs: %s", ref, strings.Join(names, ", ")).
		WithHint("banger show %s", names[0])
}

// prefixOf finds a VM whose name begins with ref.
func prefixOf(vms []store.VM, ref string) string {
	for _, v := range vms {
		if strings.HasPrefix(v.Name, ref) {
			return v.Name
		}
	}
	return ""
}

// ByRepository finds the VM of a repository by the real path of its top.
func (m *Manager) ByRepository(ctx context.Context, path string) (store.VM, bool, error) {
	vms, err := m.store.VMs(ctx)
	if err != nil {
		return store.VM{}, false, err
	}
	for _, v := range vms {
		if v.Repository == path {
			return v, true, nil
		}
	}
	return store.VM{}, false, nil
}
