package apply

import (
	"context"
	"io"
	"slices"
	"strings"

	"banger/api"
)

// branch puts the changes on a new branch as one commit on Options.Head. The user's
// configuration says who commits; nothing that it names is run.
func (s *session) branch(ctx context.Context) (Result, error) {
	name, err := s.branchName(ctx)
	if err != nil {
		return Result{}, err
	}
	index := quietEnv("GIT_INDEX_FILE=" + s.file("index"))
	git := func(in io.Reader, args ...string) (string, error) { return git(ctx, s.top, index, in, args...) }
	from := []string{"read-tree", "--empty"}
	if head := s.o.Head; head != "" {
		_, err := s.repository(ctx, "cat-file", "-e", head+"^{commit}")
		if answered(err) {
			return Result{}, api.Errorf(api.Refused, "the commit %s is not in the repository any more", shown(head)).WithHint("banger apply")
		}
		if err != nil {
			return Result{}, err
		}
		from = []string{"read-tree", head}
	}
	if _, err := git(nil, from...); err != nil {
		return Result{}, err
	}
	t, err := s.touched(ctx)
	if err != nil {
		return Result{}, err
	}
	if err := checkFilters(git, t.paths); err != nil {
		return Result{}, err
	}
	apply := []string{"apply", "--cached", "--whitespace=nowarn"}
	if s.o.Check {
		apply = append(apply, "--check")
	}
	if _, err := git(s.patch(), apply...); err != nil {
		return Result{}, refusal(err)
	}
	r := Result{Files: len(t.paths)}
	if s.o.Check {
		return r, nil
	}
	if r.Commit, err = s.commit(git, "refs/heads/"+name); err != nil {
		return Result{}, err
	}
	r.Branch = name
	return r, nil
}

// branchName is the name of the new branch, which is none yet.
func (s *session) branchName(ctx context.Context) (string, error) {
	name, err := s.repository(ctx, "check-ref-format", "--branch", s.o.Branch)
	if answered(err) {
		return "", api.Errorf(api.Invalid, "%q is no name for a branch", s.o.Branch).WithHint("banger apply --help")
	}
	if err != nil {
		return "", err
	}
	_, err = s.repository(ctx, "show-ref", "--verify", "--quiet", "refs/heads/"+name)
	if err == nil {
		return "", api.Errorf(api.Exists, "there is a branch %s already", shown(name)).WithHint("git branch -D %s", shown(name))
	}
	if !answered(err) {
		return "", err
	}
	return name, nil
}

// checkFilters refuses files that git keeps in another form than they are, by a program
// that the configuration names.
func checkFilters(git func(io.Reader, ...string) (string, error), paths []string) error {
	attributes, err := git(strings.NewReader(strings.Join(paths, "\x00")+"\x00"), "check-attr", "-z", "--cached", "--stdin", "filter")
	if err != nil {
		return err
	}
	fields := strings.Split(attributes, "\x00")
	for i := 0; i+2 < len(fields); i += 3 {
		if v := fields[i+2]; !slices.Contains([]string{"unspecified", "unset", ""}, v) {
			return api.Errorf(api.Refused, "%s is kept by the filter %s, which banger does not run", shown(fields[i]), shown(v)).WithHint("banger apply")
		}
	}
	return nil
}

// commit makes the commit of what the index holds, and then the branch, which must not be
// there yet.
func (s *session) commit(git func(io.Reader, ...string) (string, error), ref string) (string, error) {
	tree, err := git(nil, "write-tree")
	if err != nil {
		return "", err
	}
	commit := []string{"commit-tree", tree, "-F", "-"}
	if s.o.Head != "" {
		commit = append(commit, "-p", s.o.Head)
	}
	message := strings.TrimSpace(s.o.Message)
	id, err := git(strings.NewReader(message+"\n"), commit...)
	if err != nil && (strings.Contains(gitSays(err), "tell me who you are") || strings.Contains(gitSays(err), "ident name")) {
		return "", api.Errorf(api.Refused, "git does not know who commits").WithHint("git config --global user.email YOU@EXAMPLE.ORG")
	}
	if err != nil {
		return "", err
	}
	none := strings.Repeat("0", len(id))
	_, err = git(nil, "update-ref", "-m", message, ref, id, none)
	return id, err
}
