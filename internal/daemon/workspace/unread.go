package workspace

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	"banger/api"
	"banger/internal/guest/wire"
)

// unread is what git could not read in the working tree inside.
type unread struct {
	tracked map[string]bool // files of the base: for us they are as there
	folders map[string]bool // "name/"
	others  map[string]bool // files that are not in the base
	said    []string        // what else git did not take, in its words
}

// has tells whether path, of the base or new, is or lies where it cannot be read.
func (u unread) has(path string) bool { return u.tracked[path] || u.below(path) }

func (u unread) below(path string) bool {
	for dir := range parents(path) {
		if u.folders[dir+"/"] {
			return true
		}
	}
	return false
}

// notes are lines for the user of the host; user is the guest's.
func (u unread) notes(user string) []string {
	names := maps.Clone(u.folders)
	for _, some := range []map[string]bool{u.tracked, u.others} {
		for path := range some {
			if !u.below(path) {
				names[path] = true
			}
		}
	}
	if len(names) == 0 {
		return u.said
	}
	if user != "" {
		user = " by " + visible(user)
	}
	return append([]string{"left out, not readable inside" + user + ": " + list(slices.Sorted(maps.Keys(names)))}, u.said...)
}

// addAll makes work/index the working tree.
func (r guestRepo) addAll(ctx context.Context) (unread, error) {
	u := unread{tracked: map[string]bool{}, folders: map[string]bool{}, others: map[string]bool{}}
	errs := &bounded{limit: maxStderr, drop: true}
	env := r.privateEnv(workIndex)
	_, err := r.run(ctx, command{argv: []string{"git", "add", "-A", "--ignore-errors", "--", "."}, env: env, dir: r.top, errs: errs, slow: true})
	var failed *guestError
	if errors.As(err, &failed) && failed.code == 1 && api.CodeOf(err) == api.Internal {
		err = nil
	}
	if err != nil || errs.Len() == 0 {
		return u, r.orFull(ctx, err)
	}
	// git took all it could, so what differs still is what it could not read.
	out, err := r.git(ctx, env, nil, "ls-files", "-z", "-m")
	if err != nil {
		return u, err
	}
	for _, path := range splitZ([]byte(out)) {
		u.tracked[path] = true
	}
	u.parse(errs.String())
	return u, nil
}

// parse reads what "git add" said. A name with a line end in it is not understood.
func (u *unread) parse(stderr string) {
	for line := range strings.SplitSeq(stderr, "\n") {
		if name, ok := between(line, "warning: could not open directory '", "': Permission denied"); ok {
			u.folders[strings.TrimSuffix(name, "/")+"/"] = true
		} else if name, ok := between(line, `error: open("`, `"): Permission denied`); ok {
			u.others[name] = true
		} else if text, ok := strings.CutPrefix(line, "error: "); ok && len(u.said) < 10 && !strings.HasPrefix(text, "unable to index") {
			u.said = append(u.said, "left out: "+wire.CleanText(text, maxShown))
		}
	}
}

func between(line, before, after string) (string, bool) {
	if line, ok := strings.CutPrefix(line, before); ok {
		return strings.CutSuffix(line, after)
	}
	return "", false
}

// blame says of a command inside that failed, where nothing says so yet, that the
// reason is the state of the guest, and what helps. top is the repository's folder.
func (g guest) blame(err error, top string) error {
	var failed *guestError
	if !errors.As(err, &failed) || api.CodeOf(err) != api.Internal {
		return err
	}
	says := strings.ToLower(failed.stderr)
	out := api.Errorf(api.Refused, "%w", err)
	switch {
	case top == "":
		return out.WithHint("banger exec %s df -h", g.name)
	case strings.Contains(says, "permission denied"), strings.Contains(says, "operation not permitted"):
		user := g.user
		if user == "" {
			user = "USER"
		}
		if !slices.Contains(failed.argv, "-u") { // all but the checkout write below .git only
			top += "/.git"
		}
		return out.WithHint("banger exec -u root %s chown -R %s %s", g.name, user, visible(top))
	case strings.Contains(says, "read-only file system"):
		return out.WithHint("banger stop %s", g.name)
	}
	return out.WithHint("banger exec %s git -C %s fsck", g.name, visible(top))
}
