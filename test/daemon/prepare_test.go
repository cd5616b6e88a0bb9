package daemon

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/driver"
	"banger/internal/guest/wire"
	"banger/test/need"
)

// prepareSteps are the requests to the guest that take a prepare forward, the nth of
// those whose operation, or command, begins so; see workspace/doc.go. Each is a point
// before it is sent, and one when it has taken effect and nothing was made of it yet.
func prepareSteps() []struct {
	name, command string
	nth           int
} {
	return []struct {
		name, command string
		nth           int
	}{
		{"folder", "ls -A", 1}, // before it the host was inspected, and a shadow made
		{"git directories", wire.OpUntar, 1},
		{"pack", "git index-pack", 1},       // and in the middle of it, see cutConn
		{"next base", "git update-ref", 1},  // what was begun is known from here on
		{"files", "git read-tree -m -u", 1}, // the working tree
		{"index", "mv -f", 2},
		{"refs", "git update-ref", 2}, // after it all is inside, and not recorded
		{"clean-up", "rm -rf", 2},     // before it all is recorded
	}
}

// accepted is the point at which a prepare was asked for and has done nothing. The
// client kills the daemon there.
const accepted = "prepare/accepted"

// cutVMM makes points of the requests that go to its guests.
type cutVMM struct {
	driver.VMM
	at func(point string) error
}

func (v cutVMM) Channel(dir string, magic []byte) driver.Channel {
	return &cutChannel{Channel: v.VMM.Channel(dir, magic), at: v.at, seen: make(map[string]int)}
}

type cutChannel struct {
	driver.Channel
	at func(point string) error

	mu   sync.Mutex
	seen map[string]int // requests that began so, by the name of the step
}

func (c *cutChannel) Dial(ctx context.Context) (net.Conn, error) {
	conn, err := c.Channel.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return &cutConn{Conn: conn, channel: c}, nil
}

// step is the step of a prepare that a request is, or "".
func (c *cutChannel) step(frame []byte) string {
	var req wire.Request
	if _, payload, err := wire.ReadFrame(bytes.NewReader(frame), nil); err != nil || json.Unmarshal(payload, &req) != nil {
		return ""
	}
	line := req.Op
	if req.Exec != nil {
		line = strings.Join(req.Exec.Argv, " ")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	name := ""
	for _, s := range prepareSteps() {
		if !strings.HasPrefix(line, s.command) {
			continue
		}
		if c.seen[s.name]++; c.seen[s.name] == s.nth {
			name = s.name
		}
	}
	return name
}

// cutConn is one request. wire sends each frame with one Write, and closes when the
// guest has sent its last.
type cutConn struct {
	net.Conn
	channel *cutChannel
	closed  sync.Once

	mu    sync.Mutex
	step  string
	sends int
}

// middleOfPack is the frame of a pack before which half of it is through.
const middleOfPack = 6

func (c *cutConn) Write(frame []byte) (int, error) {
	c.mu.Lock()
	if c.sends++; c.sends == 1 {
		c.step = c.channel.step(frame)
	}
	step, n := c.step, c.sends
	c.mu.Unlock()
	var err error
	switch {
	case step == "":
	case n == 1:
		err = c.channel.at("prepare/" + step + "/before")
	case n == middleOfPack && step == "pack":
		err = c.channel.at("prepare/" + step + "/middle")
	}
	if err != nil {
		return 0, err
	}
	return c.Conn.Write(frame)
}

func (c *cutConn) Close() error {
	c.closed.Do(func() {
		c.mu.Lock()
		step := c.step
		c.mu.Unlock()
		if step != "" {
			c.channel.at("prepare/" + step + "/effect")
		}
	})
	return c.Conn.Close()
}

// prepareVerb brings the world's repository into a VM.
func prepareVerb() verb {
	return verb{name: "prepare", from: "running", perform: func(ctx context.Context, c *client) error { return c.prepare(ctx) }, after: (*world).wantPrepared}
}

// prepareVerbs has the prepare where it can be had: its guests need a folder /workspace
// of their own.
func prepareVerbs(t *testing.T) []verb {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Log("without prepare, which needs root here: see TestEveryStepOfPrepare")
		return nil
	}
	return []verb{prepareVerb()}
}

func (c *client) prepare(ctx context.Context) error {
	op, err := c.workspaces.Prepare(ctx, &bangerv1.PrepareWorkspaceRequest{Ref: "v", Repository: c.w.repository, IncludeUntracked: true})
	if err == nil && c.accepted != nil {
		c.accepted()
	}
	return c.do(ctx)(op, err)
}

// TestEveryStepOfPrepare kills the daemon once at each step of a prepare. What fails
// in one with the daemon alive is tested in package workspace.
func TestEveryStepOfPrepare(t *testing.T) {
	need.Need(t, "root")
	w := newWorld(t)
	v := prepareVerb()
	points := w.discover(t, v)
	if want := 2*len(prepareSteps()) + 2; len(points) != want {
		t.Fatalf("a prepare goes through %d points instead of %d: %v", len(points), want, points)
	}
	for _, point := range points {
		t.Run("kill/"+point, func(t *testing.T) { w.kill(t, v, point, 0) })
	}
}

// makeRepository makes the repository of the world: a commit, and on top of it files
// that are changed, staged, gone, executable and new.
func (w *world) makeRepository(t *testing.T) {
	t.Helper()
	dir := w.repository
	put := func(name, text string, mode fs.FileMode) {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), mode), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	git := func(args ...string) {
		cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=Ann", "-c", "user.email=ann@localhost"}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
	noise := make([]byte, 400<<10) // packs to several frames
	rand.NewChaCha8([32]byte{1}).Read(noise)
	put("noise", string(noise), 0o644)
	for _, name := range []string{"same", "changed", "staged", "gone", "deep/er/run"} {
		put(name, name+"\n", 0o644)
	}
	git("init", "-q", "-b", "main")
	git("add", "-A")
	git("commit", "-q", "-m", "first")
	put("staged", "staged\nchange\n", 0o644)
	git("add", "-A")
	put("changed", "changed\nand not committed\n", 0o644)
	put("deep/er/run", "deep/er/run\n", 0o755)
	put("new", "untracked\n", 0o644)
	if err := os.Remove(filepath.Join(dir, "gone")); err != nil {
		t.Fatal(err)
	}
	w.untouched = listing(t, dir, true)
}

// wantPrepared holds, after a daemon died in a prepare and another has opened: the VM
// runs on, nothing of the prepare is left but inside, a second one succeeds, and the
// host's repository is as it was.
func (w *world) wantPrepared(t *testing.T, d *process, vm *bangerv1.VM) {
	t.Helper()
	if vm.GetState() != bangerv1.VM_RUNNING {
		t.Fatalf("the VM is %v", vm)
	}
	scratch := filepath.Join(w.state, "cache", "workspace")
	if entries, err := os.ReadDir(scratch); len(entries) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after the daemon opened: %v, %v", entries, err)
	}
	if err := d.client().prepare(d.ctx(t)); err != nil {
		t.Fatalf("prepare after the crash: %v", err)
	}
	if entries, err := os.ReadDir(scratch); len(entries) > 0 || err != nil {
		t.Errorf("after the second prepare: %v, %v", entries, err)
	}
	inside := filepath.Join(w.state, "vms", vm.Id, "guest", "workspace", filepath.Base(w.repository))
	if got, want := listing(t, inside, false, ".git"), listing(t, w.repository, false, ".git"); got != want {
		t.Errorf("inside is\n%s\nand on the host\n%s", got, want)
	}
	for _, name := range strings.Fields(listing(t, filepath.Join(inside, ".git"), false)) {
		if strings.HasSuffix(name, ".lock") || strings.HasPrefix(name, "banger/work") || name == "refs/banger/next" || strings.Contains(name, "tmp_") {
			t.Errorf("left in the guest's .git: %s", name)
		}
	}
	if now, err := d.client().vm(d.ctx(t)); err != nil || now.Workspace.GetHostPath() != w.repository || now.Workspace.GetHead() == "" {
		t.Errorf("the workspace is recorded as %v, %v", now.GetWorkspace(), err)
	}
	if now := listing(t, w.repository, true); now != w.untouched {
		t.Errorf("the host's repository is\n%s\nand was\n%s", now, w.untouched)
	}
	// What the dead daemon had started learns of its death by a broken pipe or stream.
	wantNoProcesses(t, w.repository, filepath.Join(w.state, "vms", vm.Id, "guest/root/workspace"))
}

// listing prints every file below dir with what git keeps of it: content, and whether
// it is executable. With exact also its mode, the time it was changed, and folders: two
// equal ones mean that nothing was touched. What skip names is left out.
func listing(t *testing.T, dir string, exact bool, skip ...string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		if slices.Contains(skip, name) {
			return fs.SkipDir
		}
		info, err := e.Info()
		if err != nil || e.IsDir() && !exact {
			return err
		}
		fmt.Fprintf(&b, "%s executable=%t", name, info.Mode()&0o100 != 0)
		if exact {
			fmt.Fprintf(&b, " %v %d", info.Mode(), info.ModTime().UnixNano())
		}
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %x", sha256.Sum256(data))
		}
		b.WriteString("\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
