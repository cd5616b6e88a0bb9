package daemon

import (
	"slices"
	"strings"
	"testing"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/driver/fake"
)

// TestGuestEnds kills the daemon at each step of the clean-up after a guest that ended
// by itself, and of the start that follows a reboot: by poweroff it is stopped
// afterwards, by reboot it runs again.
func TestGuestEnds(t *testing.T) {
	w := newWorld(t)
	for _, word := range []string{"poweroff", "reboot"} {
		want, least := bangerv1.VM_STOPPED, 6
		if word == "reboot" {
			want, least = bangerv1.VM_RUNNING, 18
		}
		points := w.endPoints(t, word, want)
		if len(points) < least {
			t.Fatalf("after %s the daemon goes through %v", word, points)
		}
		for _, point := range points {
			t.Run(word+"/"+point, func(t *testing.T) {
				d := w.start(t, "kill "+point, 0)
				before := w.arrange(t, d, "running")
				d.exec(t, word)
				d.waitDead(t)
				d = w.start(t, "", 0)
				after := d.waitState(t, want, before.Handles["vmm pid"])
				if after.LastError != "" {
					t.Errorf("its last error: %s", after.LastError)
				}
				w.settled(t, d, want)
			})
		}
	}
}

// endPoints lets a guest end by word, and returns the steps that the daemon goes through.
func (w *world) endPoints(t *testing.T, word string, want bangerv1.VM_State) (points []string) {
	t.Helper()
	d := w.start(t, "", 0)
	before := w.arrange(t, d, "running")
	d.forget(t)
	d.exec(t, word)
	d.waitState(t, want, before.Handles["vmm pid"])
	for _, p := range d.points(t) {
		if (strings.HasPrefix(p, "reap/") || strings.HasPrefix(p, "reboot/")) && !slices.Contains(points, p) {
			points = append(points, p)
		}
	}
	w.settled(t, d, want)
	return points
}

// settled ends the daemon and looks at the record: the state is want, and no reboot is to
// come. Then it removes the VM.
func (w *world) settled(t *testing.T, d *process, want bangerv1.VM_State) {
	t.Helper()
	d.stop(t)
	if got := strings.TrimSpace(w.sqlite(t, "select state, reboot from vms")); got != strings.ToLower(want.String())+"|0" {
		t.Errorf("state and reboot to come are %q, want %s and none", got, want)
	}
	d = w.start(t, "", 0)
	w.clear(t, d)
	d.stop(t)
}

// rebooting is a daemon that pauses at one step of its guest's reboot, and the VM as it
// was before.
func (w *world) rebooting(t *testing.T, point string) (d *process, before *bangerv1.VM) {
	t.Helper()
	d = w.start(t, "pause "+point, 0)
	before = w.arrange(t, d, "running")
	d.exec(t, "reboot")
	d.waitPoint(t, point)
	return d, before
}

// TestRebootIsTakenOver: a stop at any step of a reboot is the last word.
func TestRebootIsTakenOver(t *testing.T) {
	w := newWorld(t)
	for _, point := range w.endPoints(t, "reboot", bangerv1.VM_RUNNING) {
		t.Run(point, func(t *testing.T) {
			d, _ := w.rebooting(t, point)
			c, ctx := d.client(), d.ctx(t)
			op, err := c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v"})
			if err != nil {
				t.Fatal(err)
			}
			d.resume(t)
			if err := c.do(ctx)(op, nil); err != nil {
				t.Fatalf("stop: %v", err)
			}
			d.waitState(t, bangerv1.VM_STOPPED, "")
			w.settled(t, d, bangerv1.VM_STOPPED)
		})
	}
}

// TestRebootAfterAll: a stop that is taken back before it began leaves the reboot to be
// carried out.
func TestRebootAfterAll(t *testing.T) {
	w := newWorld(t)
	const point = "reboot/process/acquire/effect"
	d, before := w.rebooting(t, point)
	c, ctx := d.client(), d.ctx(t)
	op, err := c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.ops.Cancel(ctx, &bangerv1.CancelOperationRequest{Id: op.Id}); err != nil {
		t.Fatal(err)
	}
	if err := c.do(ctx)(op, nil); err == nil {
		t.Fatal("the stop was not taken back")
	}
	d.resume(t)
	d.waitState(t, bangerv1.VM_RUNNING, before.Handles["vmm pid"])
	w.settled(t, d, bangerv1.VM_RUNNING)
}

// TestStopThenReboot: a guest that reboots while a user stops it stays stopped, also when
// the daemon dies at any step of that stop.
func TestStopThenReboot(t *testing.T) {
	w := newWorld(t)
	for _, point := range w.discover(t, verb{name: "stop", from: "running", perform: verbs()[2].perform}) {
		t.Run(point, func(t *testing.T) {
			d := w.start(t, "kill "+point, 0)
			w.arrange(t, d, "running")
			if err := w.host().SetScenario("v", fake.NoShutdown); err != nil {
				t.Fatal(err)
			}
			op, err := d.client().vms.Stop(d.ctx(t), &bangerv1.StopVMRequest{Ref: "v", TimeoutSeconds: 3600})
			for deadline := time.Now().Add(limit); err == nil && op.StepName != "shutdown"; time.Sleep(time.Millisecond) {
				if op = d.operation(t, op.Id); time.Now().After(deadline) {
					t.Fatalf("the stop does not begin: %v", op)
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			d.exec(t, "reboot")
			d.waitDead(t)
			d = w.start(t, "", 0)
			d.waitState(t, bangerv1.VM_STOPPED, "")
			w.settled(t, d, bangerv1.VM_STOPPED)
		})
	}
}

// TestShutdownDuringReboot: a daemon with a reboot under way is not idle; when it ends all
// the same, the next one carries the reboot out.
func TestShutdownDuringReboot(t *testing.T) {
	w := newWorld(t)
	const point = "reboot/process/acquire/effect"
	d, before := w.rebooting(t, point)
	_, err := d.client().machine.Shutdown(d.ctx(t), &bangerv1.ShutdownRequest{IfIdle: true})
	if err == nil || d.dead() {
		t.Fatalf("a daemon with a reboot under way was idle: %v", err)
	}
	if _, err := d.client().machine.Shutdown(d.ctx(t), &bangerv1.ShutdownRequest{}); err != nil {
		t.Fatal(err)
	}
	d.resume(t)
	d.waitEnded(t)
	d = w.start(t, "", 0)
	d.waitState(t, bangerv1.VM_RUNNING, before.Handles["vmm pid"])
	w.settled(t, d, bangerv1.VM_RUNNING)
}

// TestRebootThatFails is not tried again, and says why.
func TestRebootThatFails(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "fail reboot/agent/acquire/before", 0)
	w.arrange(t, d, "running")
	d.exec(t, "reboot")
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		vm, err := d.client().vm(d.ctx(t))
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("%v, %v", vm, err)
		}
		if vm.State == bangerv1.VM_STOPPED && strings.Contains(vm.LastError, "injected") {
			break
		}
	}
	w.settled(t, d, bangerv1.VM_STOPPED)
}

// waitState waits until the VM is in a state; a running one must be another process.
func (d *process) waitState(t *testing.T, want bangerv1.VM_State, oldPID string) (vm *bangerv1.VM) {
	t.Helper()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		var err error
		if vm, err = d.client().vm(d.ctx(t)); err != nil {
			t.Fatal(err)
		}
		if vm.GetState() == want && (want != bangerv1.VM_RUNNING || vm.Handles["vmm pid"] != oldPID) {
			return vm
		}
	}
	t.Fatalf("the VM does not get %s: %v", want, vm)
	return nil
}
