package workspace

import (
	"context"
	"maps"
	"strings"
	"unicode/utf8"
)

// position is what HEAD is.
type position struct {
	branch string // "refs/heads/main", empty when detached
	commit string // empty before the first
}

func (r guestRepo) position(ctx context.Context) (p position, err error) {
	own := func(args ...string) (string, error) {
		out, _, err := r.ask(ctx, command{argv: append([]string{"git"}, args...), env: r.ownEnv(), dir: r.top})
		return out, err
	}
	if p.branch, err = own("symbolic-ref", "-q", "HEAD"); err != nil {
		return p, err
	}
	p.commit, err = own("rev-parse", "-q", "--verify", "HEAD^{commit}")
	return p, err
}

// followed is the branch of the host that HEAD was last put on.
func (r guestRepo) followed(ctx context.Context) (string, error) {
	branch, err := r.git(ctx, r.lastingEnv(cacheIndex), nil, "symbolic-ref", "HEAD")
	if branch == detachedBranch {
		branch = ""
	}
	return branch, err
}

func (r guestRepo) follow(ctx context.Context, branch string) error {
	if branch == "" {
		branch = detachedBranch
	}
	return r.gitToEnd(ctx, r.lastingEnv(cacheIndex), nil, "symbolic-ref", "HEAD", branch)
}

// isIndexOf tells whether the guest's index is that of a commit, "" being none.
func (r guestRepo) isIndexOf(ctx context.Context, commit string) (bool, error) {
	_, same, err := r.ask(ctx, command{argv: []string{"git", "diff-index", "--cached", "--quiet", "--ignore-submodules=all", r.orEmpty(commit)},
		env: r.ownEnv(), dir: r.top, slow: true})
	return same, err
}

// setIndex makes the guest's index that of a commit. What our index knows of the files
// on the disk comes along, so that git need not read them all.
func (r guestRepo) setIndex(ctx context.Context, commit string) error {
	return r.gitToEnd(ctx, r.ownEnv("GIT_INDEX_FILE="+r.private(cacheIndex)), nil, "read-tree", "--index-output="+r.own("index"), "-i", "-m", commit)
}

func (r guestRepo) attach(ctx context.Context, branch string) error {
	return r.gitToEnd(ctx, r.ownEnv(), nil, "symbolic-ref", "HEAD", branch)
}

// headInside is the tree for refs/banger/head: what did not come in is there as it is
// inside, or a patch from HEAD would undo the host's commit.
func (j *preparation) headInside(ctx context.Context, behind files) (string, error) {
	if len(behind) == 0 {
		return j.snap.headTree, nil
	}
	for path, e := range lasting(j.came, nil, j.next) {
		if _, ok := behind[path]; ok {
			behind[path] = e
		}
	}
	return j.inside.derive(ctx, j.inside.lastingEnv(workBase), j.snap.headTree, behind)
}

// moveHead sets refs, and with them puts the guest's HEAD and index where the host's
// HEAD is, if the guest's work allows it: HEAD is where the host's was, or before it in
// the host's history, on the branch it was put on; nothing is staged; and every file
// came in (behind says why not), since it would look as if the guest had undone the
// host's commit. Else the guest finds the host's commits at refs/banger/host, and note
// says so once. Interrupted anywhere, it is finished by the next prepare.
func (j *preparation) moveHead(ctx context.Context, behind string, refs map[string]string) (note string, err error) {
	r := j.inside
	want := position{commit: j.repo.Head}
	if j.repo.Branch != "" && utf8.ValidString(j.repo.Branch) {
		want.branch = "refs/heads/" + strings.TrimPrefix(j.repo.Branch, "refs/heads/")
	}
	is, err := r.position(ctx)
	if err != nil {
		return "", err
	}
	followed, err := r.followed(ctx)
	if err != nil {
		return "", err
	}
	if is != want {
		obstacle, err := j.obstacle(ctx, is, want, followed, behind)
		if err != nil {
			return "", err
		}
		if obstacle != "" {
			if j.refs[refHost] != j.repo.Head || followed != want.branch {
				note = "HEAD inside stays where it is, as " + obstacle + "; the host's is at " + refHost
			}
			return note, r.setRefs(ctx, refs)
		}
		refs = maps.Clone(refs)
		if err := j.setHead(ctx, is, want, refs); err != nil {
			return "", err
		}
	}
	if err := r.setRefs(ctx, refs); err != nil {
		return "", err
	}
	if followed != want.branch {
		return "", r.follow(ctx, want.branch)
	}
	return "", nil
}

// setHead puts the index first: with HEAD still behind, the next prepare knows it.
func (j *preparation) setHead(ctx context.Context, is, want position, refs map[string]string) error {
	if want.commit != "" {
		if err := j.inside.setIndex(ctx, want.commit); err != nil {
			return err
		}
	}
	if want.branch != "" && want.branch != is.branch {
		if err := j.inside.attach(ctx, want.branch); err != nil {
			return err
		}
	}
	switch {
	case want.commit == "":
	case want.branch == "":
		refs["HEAD"] = want.commit
	default:
		refs[want.branch] = want.commit
	}
	return nil
}

// obstacle says why HEAD must stay, "" when it need not.
func (j *preparation) obstacle(ctx context.Context, is, want position, followed, behind string) (string, error) {
	isHosts := func(commit string) bool {
		return commit == "" || commit == j.refs[refHost] || commit == want.commit || j.shadow.isAncestor(ctx, commit, want.commit)
	}
	switch {
	case behind != "":
		return behind, nil
	case !isHosts(is.commit):
		return "there are commits of its own", nil
	case is.commit != "" && is.branch != want.branch && is.branch != followed:
		return "another branch is checked out there", nil
	case !isHosts(j.refs[want.branch]):
		return "its branch of that name has commits of its own", nil
	}
	for _, commit := range []string{is.commit, want.commit} {
		same, err := j.inside.isIndexOf(ctx, commit)
		if err != nil || same {
			return "", err
		}
	}
	return "something is staged there", nil
}
