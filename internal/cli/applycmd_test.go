package cli

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	bangerv1 "banger/api/banger/v1"
)

// TestApplyWords: what a patch comes to, in words. The work itself is package apply's.
func TestApplyWords(t *testing.T) {
	d := withShop(t)
	top := filepath.Join(t.TempDir(), "shop")
	t.Setenv("HOME", t.TempDir())
	t.Setenv("XDG_CONFIG_HOME", os.Getenv("HOME"))
	git := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("git", append([]string{"-C", top, "-c", "user.name=Ann", "-c", "user.email=ann@example.org"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("git %q: %v: %s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	write := func(text string) {
		if err := os.WriteFile(filepath.Join(top, "a"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(top, 0o755); err != nil {
		t.Fatal(err)
	}
	git("init", "-q")
	git("config", "user.name", "Ann")
	git("config", "user.email", "ann@example.org")
	write("host\n")
	git("add", "a")
	git("commit", "-q", "-m", "first")
	meta := &bangerv1.ExportMeta{HostPath: top, Head: git("rev-parse", "HEAD"), Notes: []string{"a note"}}
	patch := "diff --git a/a b/a\n--- a/a\n+++ b/a\n@@ -1 +1 @@\n-host\n+guest\n"
	d.patch = []*bangerv1.ExportChunk{{Meta: meta, Patch: []byte(patch[:30])}, {Patch: []byte(patch[30:])}}

	want(t, "check", d.run("apply", "--check"), result{0, "", "a note\nit applies: 1 file\n"})
	r := d.run("apply", "--branch", "x")
	want(t, "branch", r, result{0, "", "a note\nbranch x is at " + git("rev-parse", "--short=7", "x") + "\n"})
	want(t, "message", git("log", "-1", "--format=%P %s", "x"), meta.Head+" banger: changes from VM shop")
	want(t, "requests", d.called(), "show id-shop\n"+`export {"ref":"id-shop"}`+"\nshow id-shop\n"+`export {"ref":"id-shop","from_head":true}`)
	want(t, "apply", d.run("apply"), result{0, "", "a note\napplied 1 file\n"})
	want(t, "again", d.run("apply"), result{0, "", "a note\nnothing to apply: the host has these changes already\n"})
	write("other\n")
	want(t, "conflict", d.run("apply"), result{exitRefused, "",
		"a note\nbanger: cannot apply: the host's files have changed in the same places: a\nhint: banger apply --branch NAME\n"})

	// What package apply notes comes first, also ahead of an error.
	folder := filepath.Join(top, ".git", "banger-apply")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, "journal"), []byte(`{"version":2,"state":"preparing"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	want(t, "recovery", d.run("apply"), result{exitRefused, "", "a note\nan earlier apply did not come to its end; it is taken back\n" +
		"banger: cannot apply: the host's files have changed in the same places: a\nhint: banger apply --branch NAME\n"})
	d.patch = []*bangerv1.ExportChunk{{Meta: meta}}
	want(t, "nothing", d.run("apply"), result{0, "", "a note\nnothing to apply\n"})
}
