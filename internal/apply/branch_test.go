package apply

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"banger/api"
)

func TestBranch(t *testing.T) {
	r := busy(t)
	trap := filepath.Join(filepath.Dir(r.host), "trap")
	for _, hook := range []string{"reference-transaction", "pre-commit", "post-commit", "applypatch-msg"} {
		write(t, r.host, ".git/hooks/"+hook, "#!/bin/sh\ntouch "+trap+"\n")
		must(t, os.Chmod(filepath.Join(r.host, ".git/hooks", hook), 0o755))
	}
	// The working tree does not matter.
	write(t, r.host, "edited", "host\n")
	files, index := state(t, r.host, false), r.git(r.host, "ls-files", "-s", "--debug")
	must(t, r.apply(Options{Branch: "banger/shop", Check: true}))
	r.came(Result{Files: 14})
	if got := r.git(r.host, "branch", "--list", "banger/*"); got != "" {
		t.Errorf("--check made a Branch: %s", got)
	}
	must(t, r.apply(Options{Branch: "banger/shop"}))
	equal(t, "working tree", state(t, r.host, false), files)
	equal(t, "index", r.git(r.host, "ls-files", "-s", "--debug"), index)
	if got := r.git(r.host, "symbolic-ref", "HEAD"); got != "refs/heads/main" {
		t.Errorf("HEAD is %s", got)
	}
	r.git(r.guest, "commit", "-q", "-m", "x")
	equal(t, "tree", r.git(r.host, "rev-parse", "banger/shop^{tree}"), r.git(r.guest, "rev-parse", "HEAD^{tree}"))
	equal(t, "commit", r.git(r.host, "log", "--format=%P|%s|%an <%ae>", "-1", "banger/shop"), r.head+"|changes of the guest|Ann <ann@example.org>")
	r.came(Result{Files: 14, Branch: "banger/shop"})
	equal(t, "result", r.result.Commit, r.git(r.host, "rev-parse", "banger/shop"))
	if got := r.git(r.host, "fsck", "--strict", "--no-dangling"); got != "" {
		t.Errorf("fsck: %s", got)
	}
	fails(t, r.apply(Options{Branch: "banger/shop"}), api.Exists, "there is a branch banger/shop already")
	for _, name := range []string{"-x", "a..b", "a b", "@{-1}x", ".hidden", "a.lock"} {
		fails(t, r.apply(Options{Branch: name}), api.Invalid, "is no name for a branch")
	}
	if _, err := os.Stat(trap); err == nil {
		t.Error("a hook was run")
	}
	r.noFolder("with a branch")
	head := r.head
	r.head = strings.Repeat("1", 40)
	fails(t, r.apply(Options{Branch: "other"}), api.Refused, "is not in the repository any more")
	r.head = head
	write(t, r.host, ".git/info/attributes", "edited filter=lfs\n")
	fails(t, r.apply(Options{Branch: "other"}), api.Refused, "edited is kept by the filter lfs")
}

// Without a change inside there is no patch (see workspace.ExportOptions), and no branch.
func TestBranchOfNothing(t *testing.T) {
	r := newRepo(t, map[string]string{"a": "a\n"})
	must(t, os.WriteFile(r.patch, nil, 0o644))
	for _, check := range []bool{true, false} {
		must(t, r.apply(Options{Branch: "banger/shop", Check: check}))
		r.came(Result{})
	}
	if got := r.git(r.host, "branch", "--list", "banger/*"); got != "" {
		t.Errorf("there is a Branch: %s", got)
	}
}

// Without commits on the host the branch begins a history.
func TestBranchWithoutCommits(t *testing.T) {
	r := newRepo(t, nil)
	r.head = ""
	write(t, r.guest, "a", "a\n")
	r.diff()
	must(t, r.apply(Options{Branch: "first"}))
	equal(t, "commit", r.git(r.host, "log", "--format=%P|%s", "first"), "|changes of the guest")
	equal(t, "a", r.git(r.host, "show", "first:a"), "a")
}

func TestBranchWithoutIdentity(t *testing.T) {
	r := newRepo(t, map[string]string{"a": "a\n"})
	write(t, r.guest, "a", "b\n")
	r.diff()
	r.git(r.host, "config", "user.useConfigOnly", "true")
	must(t, os.Remove(filepath.Join(os.Getenv("HOME"), ".gitconfig")))
	fails(t, r.apply(Options{Branch: "x"}), api.Refused, "does not know who commits")
}

func TestLinkedWorkTree(t *testing.T) {
	r := busy(t)
	linked := filepath.Join(filepath.Dir(r.host), "linked")
	r.git(r.host, "worktree", "add", "-q", "-b", "side", linked)
	main := state(t, r.host, false)
	was := r.host
	r.host = linked
	must(t, r.apply(Options{}))
	equal(t, "working tree", state(t, linked, false), state(t, r.guest, false))
	equal(t, "main", state(t, was, false), main)
}
