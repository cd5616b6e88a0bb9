package workspace

import (
	"context"
	"slices"
	"strings"
)

// Before anything is written nobody asks what may be: that costs a request each time,
// and only trying tells all (a folder of root's, an immutable file, a mount point, a
// sticky folder). When git could not write all, it is looked again, what is stuck is
// found, and the rest is brought in without it.

// cannotWriteScript prints those of its arguments for which the next folder above does
// not take new names from this user, or where something that git does not know of (a
// pipe, a socket) lies at them or above. It is a script, as one process has to do for
// many names, and xargs brings them, as what travels as argv is valid text only.
const cannotWriteScript = `for p do
	d=$p
	while :; do
		test -e "$d" && ! test -f "$d" && ! test -d "$d" && ! test -L "$d" && break
		case $d in */*) d=${d%/*} ;; .) break ;; *) d=. ;; esac
		test -d "$d" && break
	done
	test -d "$d" && test -w "$d" && test -x "$d" || printf '%s\0' "$p"
done`

// cannotWrite are those of paths that the guest's user cannot write where they are to go.
func (r guestRepo) cannotWrite(ctx context.Context, paths []string) ([]string, error) {
	if len(paths) == 0 {
		return nil, nil
	}
	out, err := r.run(ctx, command{argv: []string{"xargs", "-0", "sh", "-c", cannotWriteScript, "sh"}, dir: r.top, slow: true,
		in: strings.NewReader(strings.Join(paths, "\x00") + "\x00")})
	return splitZ(out), err
}

// stick adds to j.stuck what a checkout of write could not write, and tells whether
// there was any. said is what git said, guest what there is now.
func (j *preparation) stick(ctx context.Context, write, guest files, said string) (bool, error) {
	var left []string
	for path, e := range write {
		if guest[path] == e {
			j.result.Updated++
		} else {
			left = append(left, path)
		}
	}
	stuck, err := j.inside.cannotWrite(ctx, left)
	if err != nil {
		return false, err
	}
	if len(stuck) == 0 {
		stuck = slices.DeleteFunc(left, func(path string) bool {
			// A repository inside the repository stays where it is.
			return write[path].mode == modeGitlink || guest[path].mode == modeGitlink || !couldNot(said, path)
		})
	}
	found := false
	for _, path := range stuck {
		if !j.stuck[path] {
			j.stuck[path], found = true, true
		}
	}
	return found, nil
}

// couldNot tells of a path that is not written, though the folder above it takes new
// names, whether that is for something there that does not go away. git goes on after a
// file, so it has tried all then; at a folder it gives up.
func couldNot(said, path string) bool {
	if _, end, ok := strings.Cut(said, "fatal: "); ok {
		// "cannot rmdir 'NAME': REASON"
		first, last := strings.IndexByte(end, '\''), strings.LastIndexByte(end, '\'')
		return strings.HasPrefix(end, "cannot ") && first < last && inTheWay([]string{end[first+1 : last]})(path)
	}
	return strings.Contains(said, "unable to unlink")
}

// stuckNote is a line for the user of the host; user is the guest's.
func stuckNote(paths []string, user string) string {
	if user != "" {
		user = " by " + visible(user)
	}
	return "left as they are, not writable inside" + user + ": " + list(paths)
}
