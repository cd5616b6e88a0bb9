package vm

import (
	"bytes"
	"crypto/sha256"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// git runs git on the host, away from the configuration of whoever runs the tests.
func git(t testing.TB, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=T", "GIT_AUTHOR_EMAIL=t@example.org", "GIT_COMMITTER_NAME=T", "GIT_COMMITTER_EMAIL=t@example.org")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// newRepo makes a repository named shop, outside of /tmp, with one commit and one
// uncommitted change.
func newRepo(t testing.TB, h *host) string {
	t.Helper()
	repo := filepath.Join(filepath.Dir(h.dir), "shop")
	write(t, filepath.Join(repo, "greet.sh"), "#!/bin/sh\necho hello\n")
	write(t, filepath.Join(repo, "sub/a.txt"), "one\n")
	write(t, filepath.Join(repo, "Makefile"), "test:\n\tsh ./greet.sh\n")
	write(t, filepath.Join(repo, "host.txt"), "as committed\n")
	git(t, repo, "init", "-q", "-b", "main")
	git(t, repo, "add", ".")
	git(t, repo, "commit", "-q", "-m", "a shop")
	write(t, filepath.Join(repo, "greet.sh"), "#!/bin/sh\necho hello from the working tree\n")
	return repo
}

// TestJob is what banger is for: a repository in, a command, a change back.
func TestJob(t *testing.T) { testJob(t, newHost(t)) }

func testJob(t *testing.T, h *host) {
	repo := newRepo(t, h)

	r := h.in(repo, nil, "up", "--", "make", "test")
	if r.code != 0 || !strings.Contains(r.stdout, "hello from the working tree") {
		t.Fatalf("up: %s", r)
	}
	if v := h.show("shop"); v.State != "RUNNING" {
		t.Fatalf("shop is %s", v.State)
	}
	// The repository lies at the same path, and git in the guest sees the same state.
	if out := h.in(repo, nil, "exec", "--", "git", "status", "--short").stdout; out != " M greet.sh\n" {
		t.Errorf("git status inside: %q", out)
	}
	if out := h.in(filepath.Join(repo, "sub"), nil, "exec", "--", "pwd").stdout; strings.TrimSpace(out) != filepath.Join(repo, "sub") {
		t.Errorf("pwd in a subdirectory: %q", out)
	}
	// A change inside comes back as a patch, and onto the working tree.
	script := "printf 'two\\n' >> sub/a.txt && printf 'new\\0bytes' > new.bin && chmod +x greet.sh && git rm -q --cached Makefile && rm Makefile"
	if r := h.in(repo, nil, "exec", "--", "sh", "-c", script); r.code != 0 {
		t.Fatalf("the change: %s", r)
	}
	if patch := h.in(repo, nil, "diff").stdout; !strings.Contains(patch, "+two") || !strings.Contains(patch, "GIT binary patch") ||
		strings.Contains(patch, "working tree") {
		t.Errorf("diff: %s", patch)
	}
	before := git(t, repo, "rev-parse", "HEAD")
	if r := h.in(repo, nil, "apply"); r.code != 0 {
		t.Fatalf("apply: %s", r)
	}
	if got := read(t, filepath.Join(repo, "sub/a.txt")); got != "one\ntwo\n" {
		t.Errorf("sub/a.txt after apply: %q", got)
	}
	if got := read(t, filepath.Join(repo, "new.bin")); got != "new\x00bytes" {
		t.Errorf("new.bin after apply: %q", got)
	}
	if _, err := os.Stat(filepath.Join(repo, "Makefile")); err == nil {
		t.Error("Makefile is still there after apply")
	}
	if info, err := os.Stat(filepath.Join(repo, "greet.sh")); err != nil || info.Mode()&0o111 == 0 {
		t.Errorf("greet.sh is not executable after apply: %v", err)
	}
	if after := git(t, repo, "rev-parse", "HEAD"); after != before {
		t.Errorf("HEAD moved: %s", after)
	}

	// A second up brings in what changed on the host alone, and leaves what changed on
	// both sides.
	write(t, filepath.Join(repo, "host.txt"), "changed on the host\n")
	write(t, filepath.Join(repo, "sub/a.txt"), "three\n")
	r = h.in(repo, nil, "up", "--", "cat", "host.txt", "sub/a.txt")
	if r.code != 0 || r.stdout != "changed on the host\none\ntwo\n" || !strings.Contains(r.stderr, "sub/a.txt") {
		t.Errorf("second up: %s", r)
	}

	// Stop and start keep the disk; rm leaves nothing.
	h.ok("stop", "shop")
	if v := h.show("shop"); v.State != "STOPPED" || !strings.Contains(v.Ended, "powered off") {
		t.Errorf("after stop: %+v", v)
	}
	h.ok("start", "shop")
	if out := h.in(repo, nil, "exec", "--", "cat", "sub/a.txt").stdout; out != "one\ntwo\n" {
		t.Errorf("after stop and start: %q", out)
	}
	h.ok("rm", "-f", "shop")
	if out := h.ok("ps", "-q"); out != "" {
		t.Errorf("after rm: %q", out)
	}
	if entries, _ := os.ReadDir(filepath.Join(h.dir, "vms")); len(entries) != 0 {
		t.Errorf("rm left %v", entries)
	}
}

// TestExec holds the streams and codes of exec against what a shell expects.
func TestExec(t *testing.T) {
	h := newHost(t)
	h.ok("create", "--name", "dev")
	for _, c := range []struct {
		name, stdin string
		args        []string
		want        result
	}{
		{"exit code", "", []string{"exec", "dev", "sh", "-c", "exit 42"}, result{code: 42}},
		{"streams apart", "", []string{"exec", "dev", "sh", "-c", "echo out; echo err >&2"}, result{stdout: "out\n", stderr: "err\n"}},
		{"stdin", "from here", []string{"exec", "-i", "dev", "cat"}, result{stdout: "from here"}},
		{"signal", "", []string{"exec", "dev", "sh", "-c", "kill -TERM $$"}, result{code: 143}},
		{"environment", "", []string{"exec", "-e", "A=b c", "dev", "printenv", "A"}, result{stdout: "b c\n"}},
		{"directory", "", []string{"exec", "-w", "/usr", "dev", "pwd"}, result{stdout: "/usr\n"}},
		{"user", "", []string{"exec", "-u", "nobody", "dev", "id", "-un"}, result{stdout: "nobody\n"}},
		{"sudo", "", []string{"exec", "dev", "sudo", "id", "-u"}, result{stdout: "0\n"}},
		{"modules", "", []string{"exec", "dev", "sudo", "modprobe", "overlay"}, result{}},
	} {
		r := h.in("", strings.NewReader(c.stdin), c.args...)
		if r != c.want {
			t.Errorf("%s: %s", c.name, r)
		}
	}
	for args, code := range map[string]int{"/no/such/program": 127, "/etc": 126} {
		if r := h.try("exec", "dev", args); r.code != code {
			t.Errorf("exec %s: %s", args, r)
		}
	}

	// 16 MiB of random bytes there and back.
	rng := rand.NewChaCha8([32]byte{1})
	data := make([]byte, 16<<20)
	rng.Read(data)
	if r := h.in("", bytes.NewReader(data), "exec", "-i", "dev", "cat"); r.code != 0 || sha256.Sum256([]byte(r.stdout)) != sha256.Sum256(data) {
		t.Errorf("16 MiB through cat: exit %d, %d bytes, %s", r.code, len(r.stdout), r.stderr)
	}
}

// TestRun runs a command in a VM that is gone afterwards.
func TestRun(t *testing.T) {
	h := newHost(t)
	r := h.try("run", "--rm", "--", "uname", "-s")
	if r.code != 0 || r.stdout != "Linux\n" {
		t.Fatalf("run: %s", r)
	}
	waitFor(t, time.Minute, "the VM to be gone", func() bool { return h.ok("ps", "-q") == "" })
}

// TestReboot: poweroff and reboot inside mean what they say.
func TestReboot(t *testing.T) {
	h := newHost(t)
	h.ok("create", "--name", "dev")
	first := h.show("dev").Handles["guest boot id"]
	h.try("exec", "dev", "sudo", "systemctl", "reboot")
	waitFor(t, bootTimeout, "the VM to run again", func() bool {
		v := h.show("dev")
		return v.State == "RUNNING" && v.Handles["guest boot id"] != first && v.Handles["guest boot id"] != ""
	})
	// The agent answers before systemd does.
	waitFor(t, bootTimeout, "systemd to take the order", func() bool {
		r := h.try("exec", "dev", "sudo", "systemctl", "poweroff")
		return r.code == 0 || h.show("dev").State == "STOPPED"
	})
	waitFor(t, bootTimeout, "the VM to be stopped", func() bool { return h.show("dev").State == "STOPPED" })
	if v := h.show("dev"); !strings.Contains(v.Ended, "powered off") {
		t.Errorf("ended: %q", v.Ended)
	}
}
