package workspace

import (
	"context"
	"fmt"
	"io"
	"time"

	"banger/api"
	"banger/internal/daemon/store"
)

// Meta says what a patch is.
type Meta struct {
	HostPath string
	Head     string // commit of the host that the base stands on, empty without commits
	Files    int
	Notes    []string // lines for the user: files that could not be read inside
}

// ExportOptions choose what the difference starts from.
type ExportOptions struct {
	// FromHead: from the commit Meta.Head, so that what was changed on the host before it
	// came in is part of the patch too, and a note counts it. Without a change since the
	// base there is no patch either.
	FromHead bool
}

// Export writes what changed inside since the base, as a binary-safe git patch: commits,
// staged and unstaged changes and new files, unless ignored, as one. The guest's own
// index, working tree and refs stay as they are. begin gets what is known before the
// first byte and returns where to write; nothing is written when Files is 0.
func (m *Manager) Export(ctx context.Context, vmID string, o ExportOptions, begin func(Meta) (io.Writer, error)) error {
	ctx, vm, leave, err := m.enter(ctx, vmID)
	if err != nil {
		return err
	}
	defer leave()
	err = because(ctx, m.guest(vm).blame(m.export(ctx, vm, o, begin), m.placed(ctx, vm.ID)))
	return explain(err, "cannot read the changes in %s", vm.Name)
}

func (m *Manager) export(ctx context.Context, vm store.VM, o ExportOptions, begin func(Meta) (io.Writer, error)) error {
	row, ok, err := m.recorded(ctx, vm.ID)
	if err != nil {
		return err
	}
	if !ok {
		return api.Errorf(api.Refused, "it holds no repository").WithHint("banger up")
	}
	r := guestRepo{guest: m.guest(vm), top: row.GuestPath, format: "sha1"}
	if there, err := r.there(ctx); err != nil || !there {
		if err == nil {
			err = api.Errorf(api.Refused, "%s inside is no repository any more", visible(r.top)).WithHint("banger up")
		}
		return err
	}
	if len(row.BaseTree) == len(format("sha256").emptyTree()) {
		r.format = "sha256"
	}
	refs, err := r.refs(ctx)
	if err != nil {
		return err
	}
	if refs[refBase] == "" {
		return api.Errorf(api.Refused, "%s inside has no %s any more", visible(r.top), refBase).WithHint("banger up")
	}
	if err := r.begin(ctx); err != nil {
		return err
	}
	defer r.end(ctx)
	changes, without, err := r.scan(ctx, refs[refBase])
	if err != nil {
		return err
	}
	notes := without.notes(r.user)
	from, err := r.settledBase(ctx, refs, changes)
	if err != nil {
		return err
	}
	_, n, err := r.diff(ctx, from)
	if err != nil {
		return err
	}
	if err := m.store.SetChanges(ctx, vm.ID, n, time.Now()); err != nil {
		return err
	}
	if o.FromHead && n > 0 {
		base := from
		if from = refs[refHead]; from == "" || refs[refHost] != row.Head {
			return api.Errorf(api.Refused, "%s inside is not on the commit that it was taken at", visible(r.top)).WithHint("banger up")
		}
		var whole files
		if whole, n, err = r.diff(ctx, from); err != nil {
			return err
		}
		dirty, err := r.dirtyBefore(ctx, whole, from, base)
		if err != nil {
			return err
		}
		if dirty > 0 {
			notes = append(notes, fmt.Sprintf("the branch also holds what was changed on the host before it came in: %s", countFiles(dirty)))
		}
	}
	w, err := begin(Meta{HostPath: row.HostPath, Head: row.Head, Files: n, Notes: notes})
	if err != nil || n == 0 {
		return err
	}
	return r.patch(ctx, from, w)
}

// dirtyBefore counts those of changes, which start at the tree head, that the base has
// other than head.
func (r guestRepo) dirtyBefore(ctx context.Context, changes files, head, base string) (n int, err error) {
	was, err := r.tree(ctx, head)
	if err != nil {
		return 0, err
	}
	came, err := r.tree(ctx, base)
	if err != nil {
		return 0, err
	}
	for path := range changes {
		if was[path] != came[path] && was[path].mode != modeGitlink && came[path].mode != modeGitlink {
			n++
		}
	}
	return n, nil
}

func countFiles(n int) string {
	if n == 1 {
		return "1 file"
	}
	return fmt.Sprintf("%d files", n)
}

// settledBase is the base, with what an interrupted prepare had brought in: that is
// the host's, not a change made inside.
func (r guestRepo) settledBase(ctx context.Context, refs map[string]string, changes files) (string, error) {
	base, next := refs[refBase], refs[refNext]
	if next == "" {
		return base, nil
	}
	was, err := r.tree(ctx, base)
	if err != nil {
		return "", err
	}
	coming, err := r.tree(ctx, next)
	if err != nil {
		return "", err
	}
	came, err := r.resume(ctx, was, overlay(was, changes), coming)
	if err != nil {
		return "", err
	}
	return r.derive(ctx, r.privateEnv(workBase), base, came)
}
