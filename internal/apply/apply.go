// Package apply puts a patch that comes from a guest onto a repository of the host: onto
// its working tree, all or nothing, or onto a new branch as one commit. The index, and with
// a branch the working tree, stay as they are. The patch is hostile: git applies it to
// copies of the files that it names, in a git directory without the user's configuration;
// what differs then is checked against the host's files and moved into place by this
// package, which stays below the working tree. A journal on the disk tells, also after a
// kill or a power loss, how far that came:
//
//	preparing   new content is written beside the files, under other names
//	moving      old files get a second name, new ones are renamed into place
//	done        the second names are removed
//
// An error before done takes everything back, and so does the next apply when this one was
// killed; from done on it has happened, and each later apply clears up what is left. A file
// that somebody changed since is left as it is, and its former content is kept under the
// second name; so is a file whose second name somebody removed or gave to something else.
// Both are named, and neither holds up the rest or the next apply. All of it lies in
// GITDIR/banger-apply, which one apply at a time has, and which is gone when nothing is left
// to do.
package apply

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"banger/api"
)

// Options say where a patch goes.
type Options struct {
	// Check only tells whether it would go.
	Check bool
	// Branch is the name of a new branch that gets the patch, as a commit on Head. Empty is
	// the working tree.
	Branch string
	// Head is the commit that the patch of a branch starts from; empty begins a history.
	Head string
	// Message is that of the commit.
	Message string

	// before is called ahead of each step that changes the working tree or the journal.
	// Only tests set it, to stop there.
	before func(step string) error
}

// Result is what was done or, with Options.Check, what would be.
type Result struct {
	// Files is how many files differ. It is 0 when nothing is to be done: the patch is
	// empty, or, when Present is set, the working tree has all of it already.
	Files   int
	Present bool
	// Branch and Commit are the branch that was made, and where it is.
	Branch, Commit string
	// Notes are lines for the user: what became of an earlier apply that was killed, and
	// what is left. They come with an error, too.
	Notes []string
}

// Patch applies patch, a whole file as workspace.Export writes it, to the repository with
// the working tree at top. An error is an *api.Error, or ctx's.
func Patch(ctx context.Context, top string, patch *os.File, o Options) (Result, error) {
	s, err := open(ctx, top, patch, o)
	if err != nil {
		return Result{}, explain(err, top)
	}
	defer s.close()
	r, err := s.run(ctx)
	r.Notes = s.notes
	return r, explain(err, top)
}

func (s *session) run(ctx context.Context) (Result, error) {
	if err := s.recover(); err != nil {
		return Result{}, err
	}
	if s.size == 0 {
		return Result{}, nil
	}
	if err := checkForms(s.patch()); err != nil {
		return Result{}, err
	}
	if s.o.Branch != "" {
		return s.branch(ctx)
	}
	return s.tree(ctx)
}

// tree applies to the working tree.
func (s *session) tree(ctx context.Context) (Result, error) {
	touched, err := s.touched(ctx)
	if err != nil {
		return Result{}, err
	}
	changes, err := s.outcome(ctx, touched)
	if err != nil {
		return Result{}, err
	}
	if err := s.checkPlaces(changes); err != nil {
		return Result{}, err
	}
	if len(changes) > 0 && !s.o.Check {
		if err := s.install(ctx, changes); err != nil {
			return Result{}, err
		}
	}
	return Result{Files: len(changes), Present: len(changes) == 0}, nil
}

// explain gives an error its code and hint, and says what failed.
func explain(err error, top string) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return err
	}
	out := api.Errorf(api.CodeOf(err), "cannot apply: %w", err)
	out.Hint = api.HintOf(err)
	if out.Code == api.Internal && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)) {
		out.Code, out.Hint = api.NoSpace, "df -h "+shown(top)
	}
	return out
}
