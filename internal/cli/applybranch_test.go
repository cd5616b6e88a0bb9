package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"banger/api"
)

func TestApplyBranch(t *testing.T) {
	r := applyBusy(t)
	trap := filepath.Join(filepath.Dir(r.host), "trap")
	for _, hook := range []string{"reference-transaction", "pre-commit", "post-commit", "applypatch-msg"} {
		applyWrite(t, r.host, ".git/hooks/"+hook, "#!/bin/sh\ntouch "+trap+"\n")
		applyMust(t, os.Chmod(filepath.Join(r.host, ".git/hooks", hook), 0o755))
	}
	// The working tree does not matter.
	applyWrite(t, r.host, "edited", "host\n")
	files, index := applyState(t, r.host, false), r.git(r.host, "ls-files", "-s", "--debug")
	applyMust(t, r.apply(applyOptions{branch: "banger/shop", vm: "shop", check: true}))
	if got := r.git(r.host, "branch", "--list", "banger/*"); got != "" {
		t.Errorf("--check made a branch: %s", got)
	}
	applyMust(t, r.apply(applyOptions{branch: "banger/shop", vm: "shop"}))
	applyEqual(t, "working tree", applyState(t, r.host, false), files)
	applyEqual(t, "index", r.git(r.host, "ls-files", "-s", "--debug"), index)
	if got := r.git(r.host, "symbolic-ref", "HEAD"); got != "refs/heads/main" {
		t.Errorf("HEAD is %s", got)
	}
	r.git(r.guest, "commit", "-q", "-m", "x")
	applyEqual(t, "tree", r.git(r.host, "rev-parse", "banger/shop^{tree}"), r.git(r.guest, "rev-parse", "HEAD^{tree}"))
	applyEqual(t, "commit", r.git(r.host, "log", "--format=%P|%s|%an <%ae>", "-1", "banger/shop"), r.head+"|banger: changes from VM shop|Ann <ann@example.org>")
	if got := r.stderr.String(); !strings.HasPrefix(got, "branch banger/shop is at ") {
		t.Errorf("said %q", got)
	}
	if got := r.git(r.host, "fsck", "--strict", "--no-dangling"); got != "" {
		t.Errorf("fsck: %s", got)
	}
	applyFails(t, r.apply(applyOptions{branch: "banger/shop", vm: "shop"}), api.Exists, "there is a branch banger/shop already")
	for _, name := range []string{"-x", "a..b", "a b", "@{-1}x", ".hidden", "a.lock"} {
		applyFails(t, r.apply(applyOptions{branch: name}), api.Invalid, "is no name for a branch")
	}
	if _, err := os.Stat(trap); err == nil {
		t.Error("a hook was run")
	}
	if _, err := os.Stat(filepath.Join(r.host, ".git/banger-apply")); err == nil {
		t.Error("the folder in .git is left")
	}
	head := r.head
	r.head = strings.Repeat("1", 40)
	applyFails(t, r.apply(applyOptions{branch: "other"}), api.Refused, "is not in the repository any more")
	r.head = head
	applyWrite(t, r.host, ".git/info/attributes", "edited filter=lfs\n")
	applyFails(t, r.apply(applyOptions{branch: "other"}), api.Refused, "edited is kept by the filter lfs")
}

// Without a change inside there is no patch (see ExportOptions.FromHead), and no branch.
func TestApplyBranchOfNothing(t *testing.T) {
	r := newApplyRepo(t, map[string]string{"a": "a\n"})
	applyMust(t, os.WriteFile(r.patch, nil, 0o644))
	for _, check := range []bool{true, false} {
		applyMust(t, r.apply(applyOptions{branch: "banger/shop", vm: "shop", check: check}))
		applyEqual(t, "said", r.stderr.String(), "nothing to apply\n")
	}
	if got := r.git(r.host, "branch", "--list", "banger/*"); got != "" {
		t.Errorf("there is a branch: %s", got)
	}
}

// Without commits on the host the branch begins a history.
func TestApplyBranchWithoutCommits(t *testing.T) {
	r := newApplyRepo(t, nil)
	r.head = ""
	applyWrite(t, r.guest, "a", "a\n")
	r.diff()
	applyMust(t, r.apply(applyOptions{branch: "first", vm: "shop"}))
	applyEqual(t, "commit", r.git(r.host, "log", "--format=%P|%s", "first"), "|banger: changes from VM shop")
	applyEqual(t, "a", r.git(r.host, "show", "first:a"), "a")
}

func TestApplyBranchWithoutIdentity(t *testing.T) {
	r := newApplyRepo(t, map[string]string{"a": "a\n"})
	applyWrite(t, r.guest, "a", "b\n")
	r.diff()
	r.git(r.host, "config", "user.useConfigOnly", "true")
	applyMust(t, os.Remove(filepath.Join(os.Getenv("HOME"), ".gitconfig")))
	applyFails(t, r.apply(applyOptions{branch: "x", vm: "shop"}), api.Refused, "does not know who commits")
}

func TestApplyLinkedWorkTree(t *testing.T) {
	r := applyBusy(t)
	linked := filepath.Join(filepath.Dir(r.host), "linked")
	r.git(r.host, "worktree", "add", "-q", "-b", "side", linked)
	main := applyState(t, r.host, false)
	was := r.host
	r.host = linked
	applyMust(t, r.apply(applyOptions{}))
	applyEqual(t, "working tree", applyState(t, linked, false), applyState(t, r.guest, false))
	applyEqual(t, "main", applyState(t, was, false), main)
}
