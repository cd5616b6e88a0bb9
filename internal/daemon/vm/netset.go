package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"banger/api"
	"banger/internal/daemon/store"
	"banger/internal/guest/wire"
	"banger/internal/netpolicy"
	"banger/internal/netwire"
	"banger/internal/shim"
)

// SetRequest changes a VM's network. Rules and publications that are asked for again are
// no error.
type SetRequest struct {
	Preset      string   // empty: as it is
	Allow, Deny []string // the same rule with the opposite action goes
	Forget      []string // rules, whatever their action
	Publish     []string
	Unpublish   []string // by the host's side; what is left out fits all: "8080", "127.0.0.1:8080/udp"
}

// apply makes the network that r asks for out of n, which is canonical. What goes, goes
// first.
func (r SetRequest) apply(n netwire.Network) (netwire.Network, error) {
	to := netwire.Network{Preset: n.Preset, Allow: slices.Clone(n.Allow), Deny: slices.Clone(n.Deny), Publish: slices.Clone(n.Publish)}
	if r.Preset != "" {
		to.Preset = r.Preset
	}
	for _, text := range r.Forget {
		if err := forgetRule(&to, text); err != nil {
			return n, err
		}
	}
	for _, add := range []struct {
		action   netpolicy.Action
		texts    []string
		to, from *[]string
	}{{netpolicy.Allow, r.Allow, &to.Allow, &to.Deny}, {netpolicy.Deny, r.Deny, &to.Deny, &to.Allow}} {
		for _, text := range add.texts {
			rule, err := canonicalRule(add.action, text)
			if err != nil {
				return n, err
			}
			remove(add.from, rule)
			*add.to = append(*add.to, rule)
		}
	}
	for _, text := range r.Unpublish {
		if err := unpublish(&to, text); err != nil {
			return n, err
		}
	}
	to.Publish = append(to.Publish, r.Publish...)
	to, err := canonicalNetwork(to)
	if err != nil {
		return n, err
	}
	return to, nil
}

// remove takes text out of list and says whether it was there.
func remove(list *[]string, text string) bool {
	n := len(*list)
	*list = slices.DeleteFunc(*list, func(s string) bool { return s == text })
	return len(*list) < n
}

func forgetRule(n *netwire.Network, text string) error {
	rule, err := canonicalRule(netpolicy.Deny, text) // which takes all that allow takes
	if err != nil {
		return err
	}
	allowed, denied := remove(&n.Allow, rule), remove(&n.Deny, rule)
	if allowed || denied {
		return nil
	}
	return api.Errorf(api.NotFound, "there is no rule %s; %s", rule, listed("the rules are", slices.Concat(n.Allow, n.Deny))).
		WithHint("banger set --help")
}

func unpublish(n *netwire.Network, text string) error {
	side, err := netwire.ParseHostSide(text)
	if err != nil {
		return invalidNetwork(err)
	}
	before := len(n.Publish)
	n.Publish = slices.DeleteFunc(n.Publish, func(text string) bool {
		p, err := netwire.ParsePublication(text)
		return err == nil && side.Fits(p)
	})
	if len(n.Publish) < before {
		return nil
	}
	return api.Errorf(api.NotFound, "port %s is not published; %s", text, listed("published are", n.Publish)).
		WithHint("banger set --help")
}

// listed is a few of what there is, in words.
func listed(what string, all []string) string {
	const most = 8
	switch {
	case len(all) == 0:
		return "there are none"
	case len(all) > most:
		return fmt.Sprintf("%s %s and %d more", what, strings.Join(all[:most], ", "), len(all)-most)
	}
	return what + " " + strings.Join(all, ", ")
}

// Set changes the network of a VM: at once, if it runs.
func (m *Manager) Set(ctx context.Context, ref string, r SetRequest) (View, error) {
	rec, err := m.Resolve(ctx, ref, true)
	if err != nil {
		return View{}, err
	}
	away, err := m.setNetwork(ctx, rec.ID, r)
	if err != nil {
		return View{}, m.wrap("change the network of", rec.Name, err)
	}
	view, err := m.Show(ctx, rec.ID)
	if away && view.Traffic != nil && view.Traffic.Problem != "" {
		view.Traffic.Problem = "its process is not there; the change is in force when it is back"
	}
	return view, err
}

// setNetwork brings the change into force and writes it to the record last: a daemon that
// dies in between leaves a record that is right, and the next one brings that into force.
// away says that the network's process is not there to confirm it.
func (m *Manager) setNetwork(ctx context.Context, id string, r SetRequest) (away bool, err error) {
	unlock, err := m.networkLocks.LockContext(ctx, id)
	if err != nil {
		return false, err
	}
	defer unlock()
	rec, err := m.record(ctx, id)
	if err != nil {
		return false, err
	}
	if rec.State == store.Deleting {
		return false, api.Errorf(api.Refused, "it is being removed").WithHint("banger ps")
	}
	was, _ := networkOf(rec)
	to, err := r.apply(was)
	if err == nil {
		err = m.refuseNetwork(r.Preset, r.Allow, r.Publish)
	}
	if err != nil {
		return false, err
	}
	ctx, cancel := undoContext(ctx) // half of it would be worse than none
	defer cancel()
	live := m.programs.Net != "" && hasNetwork(m.layout.VM(id).Path())
	if live {
		if err := m.tryPorts(ctx, id, newPorts(was, to), setHints(rec.Name)); err != nil {
			return false, err
		}
	}
	if err := m.at("set", "network", "reload", "before"); err != nil {
		return false, err
	}
	if live {
		if away, err = m.reloadOrRestore(ctx, rec, was, to); err != nil {
			return false, err
		}
	}
	if err = m.at("set", "network", "reload", "effect"); err == nil {
		err = m.storeNetwork(ctx, rec, to)
	}
	if err != nil {
		if live {
			err = errors.Join(err, m.reload(ctx, rec, was))
		}
		return false, err
	}
	return away, m.at("set", "network", "record", "effect")
}

// newPorts are the publications of to whose side of the host is not in use by was, nor by
// one of was that is in the way: banger-net makes room for those itself.
func newPorts(was, to netwire.Network) (ports []string) {
	for _, text := range to.Publish {
		p, err := netwire.ParsePublication(text)
		inUse := func(old string) bool {
			o, oldErr := netwire.ParsePublication(old)
			return err == nil && oldErr == nil && o.Overlaps(p)
		}
		if !slices.ContainsFunc(was.Publish, inUse) {
			ports = append(ports, text)
		}
	}
	return ports
}

// storeNetwork writes a network to the record and its mirror.
func (m *Manager) storeNetwork(ctx context.Context, rec store.VM, to netwire.Network) error {
	unlock := m.vmLocks.Lock(rec.ID)
	defer unlock()
	rec, err := m.store.SetNetwork(ctx, rec.ID, rec.Network, to)
	if errors.Is(err, store.ErrNotFound) {
		return notFound(rec.Name)
	}
	if err != nil {
		return err
	}
	if err := writeJSON(m.layout.VM(rec.ID).Record(), rec); err != nil {
		m.log.Warn("cannot mirror the record", "vm", rec.Name, "err", err)
	}
	return nil
}

// reloadOrRestore brings to into force. When that is refused was is, as before: err says
// why. away says that the network's process is not there, and nothing else is: it reads to
// when it comes back.
func (m *Manager) reloadOrRestore(ctx context.Context, rec store.VM, was, to netwire.Network) (away bool, err error) {
	if err := m.writeNetwork(rec, to); errors.Is(err, fs.ErrNotExist) {
		return false, nil // the run is over, its directory gone
	} else if err != nil {
		return false, err // net.json is what it was
	}
	err = m.tell(ctx, rec)
	if errors.Is(err, netwire.ErrAway) {
		return true, nil
	}
	if err == nil {
		return false, nil
	}
	if werr := m.writeNetwork(rec, was); werr != nil && !errors.Is(werr, fs.ErrNotExist) {
		err = errors.Join(err, werr)
	}
	return false, err
}

const (
	// reloadTimeout bounds a reload: banger-net is back within 100 ms when it died.
	reloadTimeout = 5 * time.Second
	reloadPoll    = 20 * time.Millisecond
)

// reload writes net.json and tells banger-net.
func (m *Manager) reload(ctx context.Context, rec store.VM, n netwire.Network) error {
	if err := m.writeNetwork(rec, n); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // the run is over, its directory gone
		}
		return err
	}
	return m.tell(ctx, rec)
}

// tell makes banger-net read net.json. A VM that ends meanwhile, or has not been started
// yet, needs no telling. The error is an ErrAway when banger-net was not there all the time.
func (m *Manager) tell(ctx context.Context, rec store.VM) error {
	dir := m.layout.VM(rec.ID).Path()
	ctx, cancel := context.WithTimeout(ctx, reloadTimeout)
	defer cancel()
	for {
		reply, err := netwire.Ask(ctx, dir, netwire.Request{Op: netwire.OpReload})
		switch {
		case err == nil:
			return m.refusedReload(ctx, rec, reply)
		case errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, netwire.ErrAway):
			return api.Errorf(api.Unresponsive, "its network does not answer").WithHint("banger show %s", rec.Name)
		case !errors.Is(err, netwire.ErrAway):
			return api.Errorf(api.Unresponsive, "%w", err).WithHint("banger show %s", rec.Name)
		}
		// Who is started from now on reads the new net.json.
		if held, herr := shim.Held(dir); herr != nil || !held {
			return herr
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(reloadPoll):
		}
	}
}

// refusedReload is nil when nothing was refused.
func (m *Manager) refusedReload(ctx context.Context, rec store.VM, reply netwire.Reply) error {
	if reply.Error == "" {
		return nil
	}
	if p, err := netwire.ParsePublication(reply.Busy); err == nil {
		return m.refusedPort(ctx, rec.ID, &portError{p, unix.EADDRINUSE}, setHints(rec.Name))
	}
	return api.Errorf(api.Refused, "%s", wire.CleanText(reply.Error, 1<<10)).WithHint("banger show %s", rec.Name)
}

// settleNetwork brings into force what the record of an adopted VM says: a daemon that died
// in a change may have left something else. It does not keep Open waiting.
func (m *Manager) settleNetwork(id string) {
	m.background(func(ctx context.Context) {
		unlock, err := m.networkLocks.LockContext(ctx, id)
		if err != nil {
			return
		}
		defer unlock()
		rec, err := m.store.VM(ctx, id)
		if err != nil || m.programs.Net == "" || !hasNetwork(m.layout.VM(id).Path()) {
			return
		}
		n, _ := networkOf(rec)
		if err := m.reload(ctx, rec, n); err != nil && ctx.Err() == nil {
			m.log.Warn("cannot bring a VM's network into force", "vm", rec.Name, "err", err)
		}
	})
}
