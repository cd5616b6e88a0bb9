package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/test/need"
)

// ending is one way to end an operation that does not get on.
type ending struct {
	name string
	act  func(ctx context.Context, c *client, op *bangerv1.Operation) error
}

func cancelIt() ending {
	return ending{"cancel", func(ctx context.Context, c *client, op *bangerv1.Operation) error {
		if _, err := c.ops.Cancel(ctx, &bangerv1.CancelOperationRequest{Id: op.Id}); err != nil {
			return err
		}
		// It ends as cancelled, which do takes for a failure.
		if err := c.do(ctx)(op, nil); err == nil || !strings.HasPrefix(err.Error(), "CANCELLED") {
			return errors.Join(errors.New("the operation was not cancelled"), err)
		}
		return nil
	}}
}

func stopIt(seconds float64) ending {
	return ending{"stop", func(ctx context.Context, c *client, _ *bangerv1.Operation) error {
		return c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v", TimeoutSeconds: seconds}))
	}}
}

func removeIt() ending {
	return ending{"rm", func(ctx context.Context, c *client, _ *bangerv1.Operation) error {
		return c.do(ctx)(c.vms.Delete(ctx, &bangerv1.DeleteVMRequest{Ref: "v", Force: true}))
	}}
}

// TestGuestHangsInPrepare: a guest that answers no more from some moment of a prepare on
// (its VMM is frozen) keeps nobody who ends the prepare, or the VM under it: all of it
// ends while the guest still hangs, the clearing up inside included, which can only fail.
func TestGuestHangsInPrepare(t *testing.T) {
	need.Need(t, "root")
	for _, c := range []struct {
		point string
		end   ending
	}{
		{"prepare/folder/effect", cancelIt()}, // nothing to clear up yet
		{"prepare/pack/middle", cancelIt()},
		{"prepare/files/before", cancelIt()}, // a command that is not broken off half way
		{"prepare/files/before", stopIt(1)},
		{"prepare/index/before", stopIt(-1)},
		{"prepare/refs/effect", removeIt()},
	} {
		t.Run(c.end.name+"/"+c.point, func(t *testing.T) {
			t.Parallel() // they mostly wait
			w := newWorld(t)
			d := w.start(t, "pause "+c.point, 0)
			before := w.arrange(t, d, "running")
			vmm := pidOf(t, before, "vmm pid")
			prepare := d.beginPrepare(t)
			d.waitPoint(t, c.point)
			if err := syscall.Kill(vmm, syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			d.resume(t)
			if err := c.end.act(d.ctx(t), d.client(), prepare); err != nil {
				t.Fatalf("%s: %v", c.end.name, err)
			}
			if op := d.operation(t, prepare.Id); op.State == bangerv1.Operation_RUNNING || op.Error.GetCode() != string(api.Cancelled) {
				t.Errorf("the prepare is %s: %s", op.State, op.Error)
			}
			if c.end.name == "cancel" { // the guest has hung all the while; it wakes up
				if state := processState(t, vmm); state != "T" {
					t.Errorf("the VMM is in state %q, not stopped by a signal", state)
				}
				if err := syscall.Kill(vmm, syscall.SIGCONT); err != nil {
					t.Fatal(err)
				}
			}
			w.wantEnded(t, d, c.end)
		})
	}
}

// TestJobThatDoesNotEnd: stop and rm wait for a workspace job that they have cancelled, but
// not for ever: here it does not end before they do.
func TestJobThatDoesNotEnd(t *testing.T) {
	need.Need(t, "root")
	const point = "prepare/files/before"
	for _, end := range []ending{stopIt(-1), removeIt()} {
		t.Run(end.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			d := w.start(t, "pause "+point, 0)
			w.arrange(t, d, "running")
			prepare := d.beginPrepare(t)
			d.waitPoint(t, point)
			if err := end.act(d.ctx(t), d.client(), prepare); err != nil {
				t.Fatalf("%s: %v", end.name, err)
			}
			if op := d.operation(t, prepare.Id); op.State != bangerv1.Operation_RUNNING {
				t.Errorf("the job was to outlast the %s, and is %s: %s", end.name, op.State, op.Error)
			}
			d.resume(t)
			if err := d.client().do(d.ctx(t))(prepare, nil); err == nil {
				t.Error("a prepare whose VM went away under it went well")
			}
			w.wantEnded(t, d, end)
		})
	}
}

// wantEnded holds that nothing is left of a prepare that was ended by end, and that the VM,
// or a new one, is as good as before.
func (w *world) wantEnded(t *testing.T, d *process, end ending) {
	t.Helper()
	vm, err := d.client().vm(d.ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	switch {
	case end.name == "rm" && vm != nil:
		t.Fatalf("the VM is %s after rm", vm.State)
	case end.name == "stop" && vm.GetState() != bangerv1.VM_STOPPED:
		t.Fatalf("after stop: %v", vm)
	case end.name != "cancel":
		if text := w.host().Text(); text != "" {
			t.Fatalf("left on the host:\n%s", text)
		}
		wantNoProcesses(t, filepath.Join(w.state, "vms"))
		if left, _ := filepath.Glob(filepath.Join(w.state, "vms/*/run")); len(left) > 0 {
			t.Fatalf("run directories left: %v", left)
		}
	}
	if entries, err := os.ReadDir(filepath.Join(w.state, "cache", "workspace")); len(entries) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left in the scratch directory: %v, %v", entries, err)
	}
	if end.name != "cancel" {
		w.usable(t, d, vm, true)
		if vm, err = d.client().vm(d.ctx(t)); err != nil {
			t.Fatal(err)
		}
	}
	w.wantPrepared(t, d, vm)
	w.clear(t, d)
	d.stop(t)
}

// beginPrepare begins to bring the world's repository into the VM "v".
func (d *process) beginPrepare(t *testing.T) *bangerv1.Operation {
	t.Helper()
	d.forget(t)
	op, err := d.client().workspaces.Prepare(d.ctx(t), &bangerv1.PrepareWorkspaceRequest{Ref: "v", Repository: d.w.repository, IncludeUntracked: true})
	if err != nil {
		t.Fatal(err)
	}
	return op
}

// processState is the letter for it in proc(5); "" when the process is gone.
func processState(t *testing.T, pid int) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(data), ") ")
	state, _, _ := strings.Cut(rest, " ")
	return state
}
