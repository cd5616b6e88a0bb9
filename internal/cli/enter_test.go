package cli

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/guest/wire"
)

// withRepository is a repository that has no VM yet.
func withRepository(t *testing.T) *fakeDaemon {
	d := newFake(t)
	d.found = func(string) (*bangerv1.FindWorkspaceResponse, error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		return &bangerv1.FindWorkspaceResponse{Repository: "/home/ann/shop", Vm: d.vms["shop"]}, nil
	}
	d.prepared = &bangerv1.Prepared{HeadShort: "3f2c1ab", Changed: 2, Workspace: &bangerv1.Workspace{GuestPath: "/home/ann/shop"}}
	d.exec = func(x wire.Exec, g *guestEnd) { g.started(); g.out("hello\n"); g.exit(3) }
	return d
}

func TestUpCreates(t *testing.T) {
	d := withRepository(t)
	d.status.AcceleratorReason = "this CPU has no vmx or svm"
	r := d.run("up", "--", "make", "test")
	want(t, "up", r, result{3, "hello\n", "KVM is not used: this CPU has no vmx or svm; VMs are emulated, which is slower\n" +
		"created shop: 4 cpus, 4G memory, 20G disk\nshop: /home/ann/shop at 3f2c1ab + 2 changed files\n"})
	want(t, "requests", d.called(), `create {"name_hint":"shop","repository":"/home/ann/shop"}`+"\n"+
		`prepare {"ref":"id-shop","repository":"/home/ann/shop"}`+"\n"+`exec shop ["make" "test"] dir=/home/ann/shop stdin`)

	// Once is enough for the word on KVM, until the reason is another.
	d.prepared = &bangerv1.Prepared{Workspace: d.prepared.Workspace, SkippedUntracked: 1, Kept: []string{"a\x1b[1m", "b"}, Notes: []string{"a note"}}
	r = d.run("up", "--", "true")
	want(t, "again", r, result{3, "hello\n", "shop: /home/ann/shop without commits, without 1 untracked file\n" +
		"changed on both sides and left as they are inside: a\\x1b[1m, b\na note\n"})
	if r := d.run("run", "-d"); strings.Contains(r.err, "KVM") {
		t.Errorf("said twice: %s", r.err)
	}
	d.status.AcceleratorReason = "/dev/kvm: permission denied"
	contains(t, "another reason", d.run("run", "-d").err, "KVM is not used: /dev/kvm: permission denied")

	want(t, "quiet", d.run("up", "--quiet", "--", "true"), result{3, "hello\n", ""})
	want(t, "detached", d.run("up", "-q", "-d"), result{0, "shop\n", ""})
}

// TestSizesBeforeTheEnd: a daemon that names the VM while it makes it lets banger say
// so at once.
func TestSizesBeforeTheEnd(t *testing.T) {
	d := newFake(t)
	var c *call
	d.script["create"] = func(op *fakeOp) {
		op.step(1, 9, "directory")
		op.set(func(m *bangerv1.Operation) {
			m.Result = &bangerv1.Operation_Vm{Vm: &bangerv1.VM{Name: "box", Cpus: 1, Memory: 1 << 30, Disk: 2 << 30}}
		})
		eventually(t, "it says so", func() bool { return strings.Contains(c.err.String(), "creating box: 1 cpu, 1G memory, 2G disk\n") })
	}
	c = d.call()
	c.start("create", "--name", "box")
	want(t, "exit code", c.wait(), 0)
	want(t, "stdout", c.out.String(), "box\n")
	if strings.Contains(c.err.String(), "created") {
		t.Error("it is said twice")
	}
}

func TestUpStarts(t *testing.T) {
	d := withRepository(t)
	d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_STOPPED})
	want(t, "up", d.run("up", "--ready", "agent", "-d").code, 0)
	want(t, "requests", d.called(), `start {"ref":"id-shop","ready":1}`+"\n"+`prepare {"ref":"id-shop","repository":"/home/ann/shop"}`)
	for _, flag := range []string{"--rm", "--name=other", "--image=x", "--cpus=1", "--memory=1G", "--disk=1G"} {
		r := d.run("up", flag, "--", "true")
		want(t, flag, r.code, 125)
		contains(t, flag, r.err, "is for a new VM, and this repository has one: shop\nhint: banger show shop")
	}
	d.script["start"] = func(op *fakeOp) { op.fail(api.NoSpace, "cannot start shop: no space left on device", "df -h") }
	d.vms["shop"].State = bangerv1.VM_STOPPED
	want(t, "failing start", d.run("up", "--", "true"), result{125, "", "banger: cannot start shop: no space left on device\nhint: df -h\n"})
	if strings.Contains(d.called(), "delete") {
		t.Error("a VM that was there before was removed")
	}
}

// TestUpRace: another up creates the repository's VM first; this one uses it.
func TestUpRace(t *testing.T) {
	d := withRepository(t)
	d.refuse["create"] = api.Errorf(api.Exists, "the repository has a VM already: shop")
	first := true
	find := d.found
	d.found = func(path string) (*bangerv1.FindWorkspaceResponse, error) {
		if first {
			first = false
			res, err := find(path)
			d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_STARTING})
			return res, err
		}
		return find(path)
	}
	want(t, "up", d.run("up", "-q", "--", "true"), result{3, "hello\n", ""})
	contains(t, "requests", d.called(), `start {"ref":"id-shop"}`)
	// A name that is taken by another VM stays an error.
	d = withRepository(t)
	d.refuse["create"] = api.Errorf(api.Exists, "a VM named box exists")
	want(t, "taken", d.run("up", "--name", "box", "--", "true"), result{125, "", "banger: a VM named box exists\n"})
}

// TestUpUndoes: a VM that this up made goes again when the command is never reached.
func TestUpUndoes(t *testing.T) {
	d := withRepository(t)
	d.script["prepare"] = func(op *fakeOp) {
		op.fail(api.Refused, "cannot bring in /home/ann/shop: a merge is under way", "git status")
	}
	r := d.run("up", "--", "true")
	want(t, "exit code", r.code, 125)
	contains(t, "stderr", r.err, "banger: cannot bring in /home/ann/shop: a merge is under way\nhint: git status\n")
	contains(t, "requests", d.called(), `delete {"ref":"id-shop","force":true}`)
	want(t, "VMs left", len(d.vms), 0)
}

// TestUpInterrupted: Ctrl-C in each phase before the command undoes what up did.
func TestUpInterrupted(t *testing.T) {
	for _, phase := range []string{"create", "prepare"} {
		t.Run(phase, func(t *testing.T) {
			d := withRepository(t)
			reached := make(chan struct{})
			d.script[phase] = func(op *fakeOp) { op.step(1, 2, "slow"); close(reached); op.undo() }
			c := d.call().start("up", "--", "true")
			<-reached
			c.kill(syscall.SIGINT)
			want(t, "exit code", c.wait(), 130)
			contains(t, "stderr", c.err.String(), "cancelling, waiting for rollback (Ctrl-C again leaves)\n", "banger: interrupted\n")
			want(t, "VMs left", len(d.vms), 0)
			if strings.Contains(d.called(), "exec") {
				t.Error("the command ran")
			}
		})
	}
	t.Run("too late", func(t *testing.T) {
		d := withRepository(t)
		reached := make(chan struct{})
		d.script["create"] = func(op *fakeOp) { op.step(1, 2, "slow"); close(reached); <-op.cancelled }
		c := d.call().start("up", "--", "true")
		<-reached
		c.kill(syscall.SIGTERM)
		want(t, "exit code", c.wait(), 130)
		want(t, "VMs left", len(d.vms), 0)
	})
}

// TestUpInterruptedStart: a VM that was stopped is stopped again, and stays.
func TestUpInterruptedStart(t *testing.T) {
	for _, phase := range []string{"start", "prepare"} {
		t.Run(phase, func(t *testing.T) {
			d := withRepository(t)
			d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_STOPPED, Workspace: &bangerv1.Workspace{GuestPath: "/home/ann/shop"}})
			reached := make(chan struct{})
			d.script[phase] = func(op *fakeOp) {
				op.step(1, 2, "slow")
				close(reached)
				if phase == "prepare" {
					op.undo()
				}
				<-op.cancelled // too late for a start
			}
			c := d.call().start("up", "--", "true")
			<-reached
			c.kill(syscall.SIGINT)
			want(t, "exit code", c.wait(), 130)
			contains(t, "requests", d.called(), `stop {"ref":"id-shop","timeout_seconds":30}`)
			want(t, "state", d.vms["shop"].State, bangerv1.VM_STOPPED)
			if strings.Contains(d.called(), "exec") || strings.Contains(d.called(), "delete") {
				t.Errorf("too much: %s", d.called())
			}
		})
	}
	// One that ran before goes on running.
	d := withRepository(t)
	d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_RUNNING})
	reached := make(chan struct{})
	d.script["prepare"] = func(op *fakeOp) { op.step(1, 2, "slow"); close(reached); op.undo() }
	c := d.call().start("up", "--", "true")
	<-reached
	c.kill(syscall.SIGINT)
	want(t, "exit code", c.wait(), 130)
	if strings.Contains(d.called(), "stop") {
		t.Errorf("it was stopped: %s", d.called())
	}
}

// TestUpGoesInAllTheSame: what keeps a repository from being brought up to date keeps
// nobody out of a VM that has it already.
func TestUpGoesInAllTheSame(t *testing.T) {
	d := withRepository(t)
	d.exec = func(x wire.Exec, g *guestEnd) { g.started(); g.exit(3) }
	code := api.NoSpace
	d.script["prepare"] = func(op *fakeOp) { op.fail(code, "the disk of shop is full", "banger exec shop df -h") }
	d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_STOPPED, Workspace: &bangerv1.Workspace{GuestPath: "/srv/shop"}})
	for _, code = range []api.Code{api.NoSpace, api.Refused} {
		want(t, string(code), d.run("up", "-q", "--", "true"),
			result{3, "", "shop is not up to date: the disk of shop is full\nhint: banger exec shop df -h\n"})
	}
	contains(t, "requests", d.called(), `exec shop ["true"] dir=/srv/shop`)
	// Another failure, and a VM that holds nothing yet, are errors.
	code = api.Internal
	want(t, "internal", d.run("up", "-q", "--", "true").code, 125)
	code = api.Refused
	d.vms["shop"].Workspace = nil
	want(t, "no workspace", d.run("up", "-q", "--", "true"), result{125, "", "banger: the disk of shop is full\nhint: banger exec shop df -h\n"})
	// A new VM goes again, so the hint must not name it.
	delete(d.vms, "shop")
	code = api.NoSpace
	want(t, "new", d.run("up", "-q", "--", "true"), result{125, "", "banger: the disk of shop is full\nhint: banger up --disk 40G\n"})
	want(t, "VMs", len(d.vms), 0)
}

// TestUpIntoLeased: somebody else's --rm takes the VM away.
func TestUpIntoLeased(t *testing.T) {
	d := withRepository(t)
	d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_RUNNING, RemoveOnRelease: true})
	r := d.run("up", "--", "true")
	want(t, "notes", strings.Count(r.err, "shop is removed when the command that holds it ends\n"), 1)
}

// TestNotBegun: a VM that was made for a command goes when the command cannot be begun;
// one that was there stays.
func TestNotBegun(t *testing.T) {
	for _, args := range [][]string{{"run", "-u", "nosuch", "--", "true"}, {"up", "-u", "nosuch", "--", "true"}} {
		d := withRepository(t)
		d.exec = func(x wire.Exec, g *guestEnd) { g.fail(wire.ErrNoUser, "there is no user nosuch") }
		r := d.run(args...)
		want(t, "exit code", r.code, 125)
		contains(t, "stderr", r.err, ": there is no user nosuch\n")
		want(t, "VMs left", len(d.vms), 0)
		if strings.Contains(r.err, "goes on running") {
			t.Errorf("it does not go on running: %s", r.err)
		}
		d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_STOPPED})
		want(t, "exit code", d.run("up", "-u", "nosuch", "--", "true").code, 125)
		want(t, "VMs left", len(d.vms), 1)
	}
}

// TestSecondInterruptLeaves: the daemon finishes alone.
func TestSecondInterruptLeaves(t *testing.T) {
	d := newFake(t)
	reached := make(chan struct{})
	d.script["create"] = func(op *fakeOp) { op.step(1, 2, "slow"); close(reached); <-t.Context().Done() }
	c := d.call().start("create")
	<-reached
	c.kill(syscall.SIGINT)
	eventually(t, "it says that it cancels", func() bool { return strings.Contains(c.err.String(), "cancelling") })
	c.kill(syscall.SIGINT)
	want(t, "exit code", c.wait(), 130)
	contains(t, "requests", d.called(), "cancel op1")
}

// TestRm: the lease is held from after the create until the VM is gone, which is
// always.
func TestRm(t *testing.T) {
	d := newFake(t)
	d.exec = func(x wire.Exec, g *guestEnd) {
		g.started()
		if d.holding() != 1 {
			t.Error("the lease is not held while the command runs")
		}
		g.exit(7)
	}
	r := d.run("run", "--rm", "--", "false")
	want(t, "exit code", r.code, 7)
	want(t, "requests", d.called(), `create {"remove_on_release":true}`+"\nhold id-quiet-fox\n"+`exec quiet-fox ["false"] stdin`+"\n"+
		`delete {"ref":"id-quiet-fox","force":true} holds:1`)
	want(t, "VMs left", len(d.vms), 0)
	eventually(t, "the lease is dropped", func() bool { return d.holding() == 0 })

	// A command that is not found, a guest that is lost, a removal that fails.
	d.exec = func(x wire.Exec, g *guestEnd) { g.fail(wire.ErrNotFound, "cannot run nope: not found") }
	want(t, "not found", d.run("run", "-q", "--rm", "--", "nope"), result{127, "", "banger: quiet-fox: cannot run nope: not found\n"})
	want(t, "VMs left", len(d.vms), 0)
	d.exec = func(x wire.Exec, g *guestEnd) { g.started() }
	r = d.run("run", "-q", "--rm", "--", "halt")
	want(t, "lost", r, result{125, "", "banger: lost the connection to quiet-fox while the command ran\nhint: banger show quiet-fox\n"})
	want(t, "VMs left", len(d.vms), 0)
	d.exec = func(x wire.Exec, g *guestEnd) { g.started(); g.exit(0) }
	d.script["delete"] = func(op *fakeOp) { op.fail(api.Internal, "cannot remove quiet-fox: stuck", "") }
	want(t, "stuck", d.run("run", "-q", "--rm", "--", "true"), result{0, "", "banger: cannot remove quiet-fox: stuck\n"})
}

// TestRmInterrupted: also when the user leaves the command by two Ctrl-C.
func TestRmInterrupted(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGHUP} {
		d := newFake(t)
		running := make(chan struct{})
		d.exec = func(x wire.Exec, g *guestEnd) {
			g.started()
			close(running)
			if !g.gone() {
				t.Error("the stream goes on")
			}
		}
		c := d.call().start("run", "--rm", "--", "sleep")
		<-running
		c.kill(sig)
		if sig == syscall.SIGINT {
			c.kill(sig)
		}
		want(t, sig.String(), c.wait(), 130)
		want(t, "VMs left", len(d.vms), 0)
	}
}

// TestSubdirectoryMissing: a directory that is only on the host is no reason to fail.
func TestSubdirectoryMissing(t *testing.T) {
	d := withShop(t)
	d.exec = func(x wire.Exec, g *guestEnd) {
		if x.Dir != "/home/ann/shop" {
			g.fail(wire.ErrNoDir, "there is no directory "+x.Dir)
			return
		}
		g.started()
		g.out(g.stdin())
		g.exit(0)
	}
	for _, args := range [][]string{{"up", "-i", "--", "cat"}, {"exec", "-i", "--", "cat"}} {
		c := d.call()
		c.stdin = strings.NewReader("nothing of it is lost")
		want(t, "exit code", c.start(args...).wait(), 0)
		want(t, "stdout", c.out.String(), "nothing of it is lost")
		contains(t, "stderr", c.err.String(), "/home/ann/shop/lib/deep does not exist inside; running in /home/ann/shop\n")
	}
	r := d.run("exec", "-w", "/nope", "--", "cat")
	want(t, "asked for", r, result{125, "", "banger: shop: there is no directory /nope\n"})
}

func TestTilde(t *testing.T) {
	d := withRepository(t)
	var asked string
	find := d.found
	d.found = func(path string) (*bangerv1.FindWorkspaceResponse, error) { asked = path; return find(path) }
	home := t.TempDir()
	if err := os.Mkdir(filepath.Join(home, "shop"), 0o700); err != nil {
		t.Fatal(err)
	}
	c := d.call()
	c.env = []string{"HOME=" + home}
	want(t, "exit code", c.start("run", "~/shop", "-d").wait(), 0)
	want(t, "path", asked, filepath.Join(home, "shop"))
}

// TestHoldOutlivesTheDaemon: the lease is taken up again within 10 s.
func TestHoldOutlivesTheDaemon(t *testing.T) {
	d := newFake(t)
	running, goOn := make(chan struct{}), make(chan struct{})
	d.exec = func(x wire.Exec, g *guestEnd) {
		g.started()
		close(running)
		<-goOn
		g.exit(0)
	}
	c := d.call().start("run", "-q", "--rm", "--", "true")
	<-running
	d.drop()
	eventually(t, "the lease is held again", func() bool { return strings.Count(d.called(), "hold id-quiet-fox") >= 2 && d.holding() == 1 })
	close(goOn)
	want(t, "exit code", c.wait(), 0)
	contains(t, "requests", d.called(), "delete")
	want(t, "VMs left", len(d.vms), 0)
}

// TestWatchOutlivesTheDaemon: an operation that the next daemon knows is watched on;
// one that it does not know has been undone.
func TestWatchOutlivesTheDaemon(t *testing.T) {
	for _, lives := range []bool{true, false} {
		d := newFake(t)
		reached, goOn, end := make(chan struct{}), make(chan struct{}), make(chan struct{})
		d.script["create"] = func(op *fakeOp) { op.step(1, 2, "slow"); close(reached); <-goOn; op.step(2, 2, "more"); <-end }
		c := d.call().start("create", "--name", "box")
		<-reached
		eventually(t, "the step is shown", func() bool { return strings.Contains(c.err.String(), "1/2 slow") })
		d.mu.Lock()
		if !lives {
			d.ops = map[string]*fakeOp{}
		}
		d.mu.Unlock()
		d.drop()
		if lives {
			close(goOn)
			eventually(t, "it watches again", func() bool { return strings.Contains(c.err.String(), "2/2 more") })
			close(end)
			want(t, "exit code", c.wait(), 0)
			contains(t, "stderr", c.err.String(), "2/2 more")
			continue
		}
		want(t, "exit code", c.wait(), 1)
		contains(t, "stderr", c.err.String(), "banger: the daemon ended during create box: it undid what was half done\nhint: banger ps\n")
		close(goOn)
		close(end)
	}
}

func TestOperations(t *testing.T) {
	d := newFake(t)
	d.add(&bangerv1.VM{Name: "box"})
	goOn := make(chan struct{})
	d.script["start"] = func(op *fakeOp) {
		op.set(func(m *bangerv1.Operation) {
			m.Step, m.Steps, m.StepName, m.BytesDone, m.BytesTotal = 3, 7, "disk", 120<<20, 400<<20
		})
		select {
		case <-op.cancelled:
			op.set(func(m *bangerv1.Operation) { m.State = bangerv1.Operation_CANCELLED })
		case <-goOn:
		}
	}
	c := d.call().start("start", "box")
	eventually(t, "it runs", func() bool { return strings.Contains(c.err.String(), "3/7 disk") })
	want(t, "op ls", d.run("op", "ls").out, "ID   KIND   TARGET  STATE    STEP                BEGAN\nop1  start  box     running  3/7 disk 120M/400M  0s ago\n")
	want(t, "op ls -q", d.run("op", "ls", "-q").out, "op1\n")
	// Ctrl-C of a wait leaves the operation alone.
	w := d.call().start("op", "wait", "op1")
	eventually(t, "it waits", func() bool { return strings.Contains(w.err.String(), "3/7 disk") })
	w.kill(syscall.SIGINT)
	want(t, "wait", w.wait(), 130)
	if strings.Contains(d.called(), "cancel") {
		t.Error("the operation was cancelled")
	}
	want(t, "op cancel", d.run("op", "cancel", "op1", "-q"), result{0, "", ""})
	want(t, "the start", c.wait(), 130)
	contains(t, "stderr", c.err.String(), "banger: operation op1 (start box) was cancelled\n")
	want(t, "op cancel again", d.run("op", "cancel", "op1"), result{0, "", "start box has ended already: cancelled\n"})
	want(t, "op wait", d.run("op", "wait", "op1").code, 130)
	want(t, "unknown", d.run("op", "wait", "nope"), result{3, "", "banger: no operation nope\nhint: banger op ls\n"})
	close(goOn)
	want(t, "second start", d.run("start", "box", "-q"), result{0, "box\n", ""})
	contains(t, "op wait, json", d.run("op", "wait", "op2", "--format", "json").out, `"state": "DONE"`)
}

// TestProgressOffTerminal: one plain line per step, no bytes, nothing with --quiet.
func TestProgressOffTerminal(t *testing.T) {
	d := newFake(t)
	seen := func(what string, c *call) {
		eventually(t, what, func() bool { return strings.Contains(c.err.String(), what) })
	}
	var c *call
	d.script["pull"] = func(op *fakeOp) {
		op.step(1, 2, "packages\x1b[2J")
		seen("1/2 packages", c)
		for n := int64(1); n <= 3; n++ {
			op.set(func(m *bangerv1.Operation) { m.BytesDone, m.BytesTotal = n<<20, 3<<20 })
		}
		op.step(2, 2, "file system")
		seen("2/2 file", c)
	}
	c = d.call()
	c.start("image", "pull")
	want(t, "exit code", c.wait(), 0)
	want(t, "stderr", c.err.String(), "1/2 packages\\x1b[2J\n2/2 file system\n")
	delete(d.script, "pull")
	want(t, "quiet", d.run("image", "pull", "-q"), result{0, "debian-bookworm\n", ""})
}

func TestUnwritableStdout(t *testing.T) {
	d := newFake(t)
	d.add(&bangerv1.VM{Name: "box"})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer w.Close()
	for _, args := range [][]string{{"ps"}, {"exec", "box", "yes"}} {
		d.exec = func(x wire.Exec, g *guestEnd) {
			g.started()
			for range 1000 {
				if err := g.out("y\n"); err != nil {
					if !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
						t.Error(err)
					}
					return
				}
			}
			if !g.gone() {
				t.Error("the stream goes on")
			}
		}
		c := d.call()
		c.stdout = w
		want(t, strings.Join(args, " "), c.start(args...).wait(), 141)
		want(t, "stderr", c.err.String(), "")
	}
}

// TestAgo reads times as people do.
func TestAgo(t *testing.T) {
	a := &app{now: now}
	for d, s := range map[time.Duration]string{
		-time.Hour: "0s ago", 59 * time.Second: "59s ago", 90 * time.Minute: "1h ago", 47 * time.Hour: "47h ago", 72 * time.Hour: "3d ago",
	} {
		want(t, d.String(), a.ago(stamp(now().Add(-d))), s)
	}
	want(t, "never", a.ago(nil), "-")
}

// TestTwoSignalsAsOne: a Ctrl-C that the next one follows at once is not lost on the
// daemon.
func TestTwoSignalsAsOne(t *testing.T) {
	for range 20 {
		d := newFake(t)
		d.script["create"] = func(op *fakeOp) { op.step(1, 2, "slow"); op.undo() }
		c := d.call().start("create", "--name", "box")
		eventually(t, "it is watched", func() bool { return strings.Contains(c.err.String(), "1/2 slow") })
		c.kill(syscall.SIGINT)
		c.kill(syscall.SIGINT)
		want(t, "exit code", c.wait(), 130)
		contains(t, "requests", d.called(), "cancel op1")
	}
}

// TestHintsNameWhatWasTyped: the daemon knows neither the verb nor the folder as it was
// typed.
func TestHintsNameWhatWasTyped(t *testing.T) {
	d := newFake(t)
	home, odd := t.TempDir(), "it's here"
	t.Setenv("HOME", home)
	if err := os.Mkdir(filepath.Join(home, odd), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(home)
	for _, c := range []struct {
		argv []string
		hint string
	}{
		{[]string{"up", "--", "true"}, "git init"},
		{[]string{"up", home, "--", "true"}, "git init " + home},
		{[]string{"up", "~", "--", "true"}, "git init " + home},
		{[]string{"run", "./", "--", "true"}, "git init ./"},
		{[]string{"up", odd, "--", "true"}, `git init 'it'\''s here'`},
		{[]string{"workspace", "prepare", "./" + odd}, `git init './it'\''s here'`},
	} {
		contains(t, strings.Join(c.argv, " "), d.run(c.argv...).err, "\nhint: "+c.hint+"\n")
	}

	d = withRepository(t)
	for _, how := range []string{"refused", "failed"} {
		if how == "refused" {
			d.refuse["create"] = api.Errorf(api.Invalid, "too much").WithHint("banger create --memory 4G")
		} else {
			d.refuse = nil
			d.script["create"] = func(op *fakeOp) { op.fail(api.Invalid, "too much", "banger create --memory 4G") }
		}
		for _, verb := range []string{"create", "run", "up", "vm create"} {
			argv := append(strings.Fields(verb), "--memory", "8G")
			if verb == "run" || verb == "up" {
				argv = append(argv, "--", "true")
			}
			want(t, how+" "+verb, d.run(argv...).err, "banger: too much\nhint: banger "+verb+" --memory 4G\n")
		}
	}
}
