package daemon

import (
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	bangerv1 "banger/api/banger/v1"
)

// TestStopNotRecorded: a stop whose last write fails has let go of everything and says
// that it failed. The VM gets stopped by itself once the store can be written again.
func TestStopNotRecorded(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	w.arrange(t, d, "running")
	c, ctx := d.client(), d.ctx(t)
	w.sqlite(t, "create trigger refuse before update of state on vms when new.state = 'stopped' "+
		"begin select raise(fail, 'refused by the test'); end;")
	if err := c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v"})); err == nil || !strings.Contains(err.Error(), "refused by the test") {
		t.Fatalf("stop: %v", err)
	}
	if vm, err := c.vm(ctx); err != nil || vm.GetState() != bangerv1.VM_STOPPING {
		t.Fatalf("after the stop that failed: %v, %v", vm, err)
	}
	if text := w.host().Text(); text != "" {
		t.Fatalf("left on the host:\n%s", text)
	}
	w.sqlite(t, "drop trigger refuse;")
	if vm := d.waitState(t, bangerv1.VM_STOPPED, ""); vm.LastError != "" || vm.Ended != "the guest powered off" {
		t.Errorf("settled with %q, and ended: %q", vm.LastError, vm.Ended)
	}
	if d.dead() {
		t.Fatal("the daemon has ended")
	}
	if err := c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "v"})); err != nil {
		t.Fatalf("start: %v", err)
	}
	w.clear(t, d)
	d.stop(t)
}

// TestProcessKilled: whichever process of a VM is killed, the VM's state is true soon, all
// that it held is let go of, and it can be started again.
func TestProcessKilled(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	vm := w.arrange(t, d, "running")
	c, ctx := d.client(), d.ctx(t)
	for _, killed := range [][]string{{"vmm pid"}, {"shim pid"}, {"shim pid", "vmm pid"}} {
		for _, who := range killed {
			if err := syscall.Kill(pidOf(t, vm, who), syscall.SIGKILL); err != nil && err != syscall.ESRCH {
				t.Fatal(err)
			}
		}
		begun := time.Now()
		after := d.waitState(t, bangerv1.VM_STOPPED, "")
		t.Logf("%v killed: seen after %s, as %q", killed, time.Since(begun).Round(time.Millisecond), after.Ended)
		if after.LastError != "" || after.Problem != "" || len(after.Handles) > 1 {
			t.Errorf("%v killed: %v", killed, after)
		}
		if killed[0] == "vmm pid" && !strings.Contains(after.Ended, "signal") {
			t.Errorf("the VM ended: %q", after.Ended)
		}
		if text := w.host().Text(); text != "" {
			t.Errorf("%v killed: left on the host:\n%s", killed, text)
		}
		wantNoProcesses(t, filepath.Join(w.state, "vms"))
		if _, err := os.Stat(filepath.Join(w.state, "vms", vm.Id, "run")); !os.IsNotExist(err) {
			t.Errorf("%v killed: run/ is there: %v", killed, err)
		}
		w.usable(t, d, after, true)
		var err error
		if vm, err = c.vm(ctx); err != nil || vm.GetState() != bangerv1.VM_RUNNING {
			t.Fatalf("started again: %v, %v", vm, err)
		}
	}
	w.clear(t, d)
	d.stop(t)
}

// pidOf is one of the processes of a running VM.
func pidOf(t *testing.T, vm *bangerv1.VM, who string) int {
	t.Helper()
	pid, err := strconv.Atoi(vm.GetHandles()[who])
	if err != nil || pid <= 1 {
		t.Fatalf("the VM has no %s: %v", who, vm)
	}
	return pid
}

// TestHostReboot: after the host went down in the middle of everything a VM that ran
// is stopped, with its disk, and can be started.
func TestHostReboot(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	vm := w.arrange(t, d, "running")
	d.cmd.Process.Kill()
	d.waitDead(t)
	for _, key := range []string{"shim pid", "vmm pid"} {
		syscall.Kill(pidOf(t, vm, key), syscall.SIGKILL)
	}
	run := filepath.Join(w.state, "vms", vm.Id, "run")
	wantNoProcesses(t, filepath.Join(w.state, "vms"))
	for _, name := range []string{"handles.json", "processes.json"} {
		data, err := os.ReadFile(filepath.Join(run, name))
		if err != nil {
			t.Fatal(err)
		}
		boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			t.Fatal(err)
		}
		old := strings.ReplaceAll(string(data), strings.TrimSpace(string(boot)), "an-earlier-boot")
		if err := os.WriteFile(filepath.Join(run, name), []byte(old), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// What the kernel held is gone with it.
	for _, dir := range []string{"dm", "loop"} {
		if err := os.RemoveAll(filepath.Join(w.hostDir, dir)); err != nil {
			t.Fatal(err)
		}
	}
	d = w.start(t, "", 0)
	after, err := d.client().vm(d.ctx(t))
	if err != nil || after.GetState() != bangerv1.VM_STOPPED {
		t.Fatalf("%v, %v", after, err)
	}
	w.usable(t, d, after, true)
	w.clear(t, d)
	d.stop(t)
}

// TestAdopt: a VM that ran on without a daemon is the same one for the next: it holds
// the same things, and its guest can be reached.
func TestAdopt(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	before := w.arrange(t, d, "running")
	if before.Handles["guest boot id"] == "" {
		t.Fatalf("a running VM holds %v", before.Handles)
	}
	d.cmd.Process.Kill()
	d.waitDead(t)
	d = w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)
	after, err := c.vm(ctx)
	if err != nil || after.State != bangerv1.VM_RUNNING || after.Problem != "" || !maps.Equal(before.Handles, after.Handles) {
		t.Fatalf("adopted %v, and it was %v: %v", after, before, err)
	}
	if err := c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v"})); err != nil {
		t.Fatal(err)
	}
	if after, err = c.vm(ctx); err != nil || after.Ended != "the guest powered off" {
		t.Fatalf("the adopted guest was not asked to go down: %v, %v", after, err)
	}
	w.clear(t, d)
	d.stop(t)
}

// TestLostHandles: a VM whose handles.json is unreadable, or of an earlier boot of the
// host, can still be stopped, and nothing leaks.
func TestLostHandles(t *testing.T) {
	w := newWorld(t)
	for name, content := range map[string]string{
		"broken": "{", "empty": "", "another boot": `{"version":1,"boot_id":"0"}`, "newer": `{"version":99}`,
	} {
		t.Run(name, func(t *testing.T) {
			d := w.start(t, "", 0)
			vm := w.arrange(t, d, "running")
			d.cmd.Process.Kill()
			d.waitDead(t)
			if err := os.WriteFile(filepath.Join(w.state, "vms", vm.Id, "run", "handles.json"), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			d = w.start(t, "", 0)
			after, err := d.client().vm(d.ctx(t))
			if err != nil || after.State != bangerv1.VM_RUNNING || after.Problem == "" {
				t.Fatalf("%v, %v", after, err)
			}
			w.clear(t, d)
			d.stop(t)
		})
	}
}

// TestLostRow: a row that is lost is made again from record.json; a disk with neither
// is moved to lost.
func TestLostRow(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	vm := w.arrange(t, d, "running")
	d.cmd.Process.Kill()
	d.waitDead(t)
	w.sqlite(t, "delete from vms;")
	d = w.start(t, "", 0)
	after, err := d.client().vm(d.ctx(t))
	if err != nil || after == nil || after.Id != vm.Id || after.State != bangerv1.VM_RUNNING || after.Handles["vmm pid"] != vm.Handles["vmm pid"] {
		t.Fatalf("made again: %v, %v", after, err)
	}
	d.cmd.Process.Kill()
	d.waitDead(t)
	w.sqlite(t, "delete from vms;")
	if err := os.Remove(filepath.Join(w.state, "vms", vm.Id, "record.json")); err != nil {
		t.Fatal(err)
	}
	d = w.start(t, "", 0)
	if after, err := d.client().vm(d.ctx(t)); err != nil || after != nil {
		t.Fatalf("a VM without row and record: %v, %v", after, err)
	}
	wantMarker(t, filepath.Join(w.state, "lost", vm.Id, "disk"))
	if text := w.host().Text(); text != "" {
		t.Fatalf("left on the host:\n%s", text)
	}

	// Its image may be what the disk stands on: it outlives a pull that replaces it, and
	// goes when nobody keeps such a disk any more.
	images := func() int {
		entries, err := os.ReadDir(filepath.Join(w.state, "images"))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before, c := images(), d.client()
	if err := c.do(d.ctx(t))(c.images.Pull(d.ctx(t), &bangerv1.PullImageRequest{Force: true})); err != nil {
		t.Fatal(err)
	}
	d.stop(t)
	d = w.start(t, "", 0)
	if n := images(); n != before+1 {
		t.Errorf("with a disk in lost there are %d images instead of %d", n, before+1)
	}
	d.stop(t)
	if err := os.RemoveAll(filepath.Join(w.state, "lost")); err != nil {
		t.Fatal(err)
	}
	d = w.start(t, "", 0)
	if n := images(); n != before {
		t.Errorf("with no disk in lost there are %d images instead of %d", n, before)
	}
	d.stop(t)
}

// TestOrphans: objects of the host that belong to no VM are removed when the daemon
// opens; those of a VM that runs stay.
func TestOrphans(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	w.arrange(t, d, "running")
	living := w.host().Text()
	d.stop(t)
	for _, path := range []string{"dm/bgfake-ghost", "loop/loop7"} {
		if err := os.WriteFile(filepath.Join(w.hostDir, path), []byte("ghost\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if w.host().Text() == living {
		t.Fatal("the orphans do not show")
	}
	d = w.start(t, "", 0)
	if text := w.host().Text(); text != living {
		t.Errorf("the host is\n%s\nand was\n%s", text, living)
	}
	w.clear(t, d)
	d.stop(t)
}
