package workspace

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"banger/api"
	"banger/internal/daemon/locks"
	"banger/internal/daemon/store"
	"banger/internal/guest/agent"
	"banger/internal/guest/wire"
)

func TestMain(m *testing.M) {
	agent.RunChild()
	os.Exit(m.Run())
}

// world is one host repository, one guest (the real agent, in this process, with a
// folder for its repositories) and a manager between them.
type world struct {
	t      *testing.T
	host   string // the repository
	inside string // where it goes
	guests *fakeGuests
	store  *store.Store
	m      *Manager
}

const vmID = "vm1"

func newWorld(t *testing.T) *world {
	t.Helper()
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CONFIG_HOME", filepath.Join(home, ".config"))
	t.Setenv("GIT_CONFIG_GLOBAL", filepath.Join(home, ".gitconfig"))
	t.Setenv("GIT_TEST_FSYNC", "0") // of the test's own git
	write(t, home, ".gitconfig", "[user]\n\tname = Ann O\n\temail = ann@example.org\n[init]\n\tdefaultBranch = main\n")
	top := t.TempDir()
	w := &world{t: t, host: filepath.Join(top, "shop"), inside: filepath.Join(top, "guest", "shop")}
	w.guests = newFakeGuests(t)
	var err error
	ctx := context.Background()
	if w.store, err = store.Open(ctx, filepath.Join(t.TempDir(), "db")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.store.Close() })
	check(t, w.store.ReplaceKernel(ctx, store.Kernel{Name: "k", CreatedAt: time.Now()}))
	check(t, w.store.InsertImage(ctx, store.Image{ID: "i", Name: "i", Kernel: "k", CreatedAt: time.Now()}))
	w.insertVM()
	w.restart()
	check(t, os.MkdirAll(w.host, 0o755))
	w.git(w.host, "init", "-q", "-b", "main")
	return w
}

func (w *world) insertVM() {
	check(w.t, w.store.InsertVM(context.Background(), store.VM{
		ID: vmID, Name: "shop", State: store.Running, Slot: 1, ImageID: "i", Kernel: "k", CPUs: 1, Memory: 1, Disk: 1, CreatedAt: time.Now(),
	}))
}

// restart is a new daemon on the same store.
func (w *world) restart() {
	w.guests.setHook(nil)
	checker := locks.NewChecker()
	w.guests.checker = checker
	w.m = New(Options{Store: w.store, Guests: w.guests, Checker: checker, Logger: slog.New(slog.DiscardHandler), Scratch: filepath.Join(filepath.Dir(w.host), "scratch")})
	w.m.places.fallback = filepath.Dir(w.inside)
}

func (w *world) git(dir string, args ...string) string {
	w.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		w.t.Fatalf("git %q in %s: %v\n%s", args, dir, err, stderr.String())
	}
	return strings.TrimSuffix(string(out), "\n")
}

// commit commits everything on the host.
func (w *world) commit(message string) string {
	w.t.Helper()
	w.git(w.host, "add", "-A")
	w.git(w.host, "commit", "-q", "--allow-empty", "-m", message)
	return w.git(w.host, "rev-parse", "HEAD")
}

func (w *world) prepare(untracked ...bool) Prepared {
	w.t.Helper()
	p, err := w.tryPrepare(context.Background(), untracked...)
	if err != nil {
		w.t.Fatalf("prepare: %v\nhint: %s", err, api.HintOf(err))
	}
	return p
}

func (w *world) tryPrepare(ctx context.Context, untracked ...bool) (Prepared, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return w.m.Prepare(ctx, vmID, w.host, len(untracked) > 0 && untracked[0], &steps{})
}

func (w *world) export() (Meta, string) {
	w.t.Helper()
	meta, patch, err := w.tryExport(context.Background(), ExportOptions{})
	if err != nil {
		w.t.Fatalf("export: %v", err)
	}
	return meta, patch
}

func (w *world) tryExport(ctx context.Context, o ExportOptions) (Meta, string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var meta Meta
	var patch bytes.Buffer
	err := w.m.Export(ctx, vmID, o, func(m Meta) (io.Writer, error) { meta = m; return &patch, nil })
	return meta, patch.String(), err
}

// steps is a Progress that remembers.
type steps struct {
	mu    sync.Mutex
	names []string
	bytes int64
}

func (s *steps) Step(k, n int, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names = append(s.names, fmt.Sprintf("%d/%d %s", k, n, name))
}

func (s *steps) Bytes(done, _ int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bytes = max(s.bytes, done)
}

// fakeGuests serves the real agent in this process.
type fakeGuests struct {
	agent   *agent.Agent
	checker *locks.Checker

	mu    sync.Mutex
	calls [][]string // argv of each command, or the operation
	hook  func(n int, req *wire.Request) fault
	down  error
}

// fault is what goes wrong with one request.
type fault int

const (
	none   fault = iota
	before       // the connection breaks before the request arrives
	after        // it was carried out, and nobody hears of it
)

func newFakeGuests(t *testing.T) *fakeGuests {
	me, err := user.Current()
	check(t, err)
	return &fakeGuests{agent: agent.New(agent.Options{Config: wire.Config{User: &wire.User{Name: me.Username}}})}
}

func (g *fakeGuests) setHook(hook func(n int, req *wire.Request) fault) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hook, g.calls = hook, nil
}

func (g *fakeGuests) Running(context.Context, string) (store.VM, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return store.VM{ID: vmID, Name: "shop"}, g.down
}

func (g *fakeGuests) Dial(ctx context.Context, id string) (net.Conn, error) {
	g.checker.AssertGuestIO("dialling a guest")
	if id != vmID {
		return nil, fmt.Errorf("no VM %s", id)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	client, proxy := net.Pipe()
	go g.serve(proxy)
	return client, nil
}

// serve passes one request to the agent, after the hook.
func (g *fakeGuests) serve(conn net.Conn) {
	defer conn.Close()
	from := wire.NewStream(conn)
	kind, payload, err := from.Recv()
	if err != nil || kind != wire.KindRequest {
		return
	}
	var req wire.Request
	if err := unmarshal(payload, &req); err != nil {
		return
	}
	if req.Exec != nil && req.Exec.User == "root" && os.Getuid() != 0 {
		req.Exec.User = ""
	}
	g.mu.Lock()
	argv := []string{req.Op}
	if req.Exec != nil {
		argv = req.Exec.Argv
	}
	g.calls = append(g.calls, argv)
	n, hook := len(g.calls), g.hook
	g.mu.Unlock()
	what := none
	if hook != nil {
		what = hook(n, &req)
	}
	if what == before {
		return
	}
	if req.Exec != nil {
		// The disk is this machine's, and what others write to it is not ours to wait for.
		req.Exec.Env = append(req.Exec.Env, "GIT_TEST_FSYNC=0")
		if req.Exec.Argv[0] == "sync" {
			req.Exec.Argv = []string{"true"}
		}
	}
	a, b := net.Pipe()
	done := make(chan struct{})
	go func() { defer close(done); g.agent.Handle(b) }()
	to := wire.NewStream(a)
	defer to.Close()
	if err := to.SendJSON(wire.KindRequest, req); err != nil {
		return
	}
	go func() {
		defer to.Close()
		if _, err := wire.Relay(to, from, wire.Kind.FromHost); err != nil && what == after {
			<-done
		}
	}()
	for {
		kind, payload, err := to.Recv()
		if err != nil {
			break
		}
		if what == after && kind.Last() {
			break
		}
		if from.Send(kind, payload) != nil || kind.Last() {
			break
		}
	}
	to.Close()
	<-done
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	path := filepath.Join(dir, name)
	check(t, os.MkdirAll(filepath.Dir(path), 0o755))
	check(t, os.WriteFile(path, []byte(text), 0o644))
}

func read(t *testing.T, dir, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, name))
	check(t, err)
	return string(data)
}

func exists(dir, name string) bool {
	_, err := os.Lstat(filepath.Join(dir, name))
	return err == nil
}

// state prints every file below dir with its mode, time and content: two equal ones
// mean that nothing was touched. With times off, only what a person would see.
func state(t *testing.T, dir string, times bool, skip ...string) string {
	t.Helper()
	var b strings.Builder
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		if slices.Contains(skip, rel) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if d.IsDir() && !times {
			return nil
		}
		fmt.Fprintf(&b, "%q %v", rel, info.Mode())
		if times {
			fmt.Fprintf(&b, " %v", info.ModTime().UnixNano())
		}
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if len(data) > 60 {
				fmt.Fprintf(&b, " %x", sha256.Sum256(data))
			} else {
				fmt.Fprintf(&b, " %q", data)
			}
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %q", target)
		}
		b.WriteString("\n")
		return nil
	}))
	return b.String()
}

// tree is state of a working tree without its git directory.
func tree(t *testing.T, dir string) string { return state(t, dir, false, ".git") }

func want(t *testing.T, what string, got, want any) {
	t.Helper()
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		t.Errorf("%s:\n got %s\nwant %s", what, g, w)
	}
}

// untouched fails unless two states are equal.
func untouched(t *testing.T, what, was, now string) {
	t.Helper()
	before, after := strings.Split(was, "\n"), strings.Split(now, "\n")
	for _, line := range before {
		if !slices.Contains(after, line) {
			t.Errorf("%s: was %s", what, line)
		}
	}
	for _, line := range after {
		if !slices.Contains(before, line) {
			t.Errorf("%s: now %s", what, line)
		}
	}
}

func wantError(t *testing.T, err error, code api.Code, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %s %q", code, parts)
	}
	if api.CodeOf(err) != code {
		t.Errorf("code of %q is %s, want %s", err, api.CodeOf(err), code)
	}
	if api.HintOf(err) == "" && code != api.NotFound && code != api.Cancelled {
		t.Errorf("%q has no hint", err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error is %q, want it to contain %q", err, p)
		}
	}
}
