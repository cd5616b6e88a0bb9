// Package daemon tests bangerd on the fake host. Above all it kills it at every step
// of every operation: the host outlives it, and after the next Open the world must fit
// the records again. The daemon is a process of its own (this test binary) and dies by
// SIGKILL, from inside, at the step that a hook names.
package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/driver/fake"
)

// verb is one operation on the VM "v", and the state that it begins in.
type verb struct {
	name    string
	from    string // "none", "stopped", "running"
	perform func(ctx context.Context, c *client) error
	// after, unless nil, is what must hold of the VM after a kill, besides what must
	// hold after each.
	after func(w *world, t *testing.T, d *process, vm *bangerv1.VM)
}

func verbs() []verb {
	return []verb{
		{name: "create", from: "none", perform: func(ctx context.Context, c *client) error {
			return c.create(ctx, false)
		}},
		{name: "start", from: "stopped", perform: func(ctx context.Context, c *client) error {
			return c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "v", Ready: bangerv1.Ready_READY_AGENT}))
		}},
		{name: "stop", from: "running", perform: func(ctx context.Context, c *client) error {
			return c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v"}))
		}},
		{name: "rm", from: "running", perform: func(ctx context.Context, c *client) error {
			return c.do(ctx)(c.vms.Delete(ctx, &bangerv1.DeleteVMRequest{Ref: "v", Force: true}))
		}},
	}
}

// marker is what a user wrote to a finished disk.
const marker = "what a user wrote"

// TestEveryStep kills the daemon once at each step of each verb, and fails the step
// there, with the daemon alive.
func TestEveryStep(t *testing.T) {
	w := newNetworkWorld(t)
	for _, v := range verbs() {
		points := w.discover(t, v)
		if len(points) < 6 {
			t.Fatalf("%s goes through %d steps only: %v", v.name, len(points), points)
		}
		for _, point := range points {
			t.Run("kill/"+point, func(t *testing.T) { w.kill(t, v, point, 0) })
		}
		for _, point := range points {
			t.Run("fail/"+point, func(t *testing.T) { w.fail(t, v, point) })
		}
	}
}

// TestSeededMoments kills the daemon at 200 moments: a step, and up to 3 ms after it.
// Every step is hit.
func TestSeededMoments(t *testing.T) {
	w := newWorld(t)
	type moment struct {
		verb  verb
		point string
	}
	var all []moment
	for _, v := range append(verbs(), prepareVerbs(t)...) {
		for _, p := range w.discover(t, v) {
			all = append(all, moment{v, p})
		}
	}
	const seed, moments = 20261124, 200
	rng := rand.New(rand.NewPCG(seed, seed))
	hits := make(map[string]int)
	var order []moment
	for range moments {
		if len(order) == 0 {
			order = slices.Clone(all)
			rng.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		}
		m := order[0]
		order = order[1:]
		delay := time.Duration(rng.Int64N(int64(3 * time.Millisecond)))
		w.kill(t, m.verb, m.point, delay)
		if t.Failed() {
			t.Fatalf("seed %d, at %s + %s", seed, m.point, delay)
		}
		hits[m.point]++
	}
	var table strings.Builder
	for _, m := range all {
		fmt.Fprintf(&table, "%4d  %s\n", hits[m.point], m.point)
		if hits[m.point] == 0 {
			t.Errorf("no kill at %s", m.point)
		}
	}
	t.Logf("hits per step, seed %d:\n%s", seed, table.String())
}

// discover performs a verb once and returns the steps that it went through.
func (w *world) discover(t *testing.T, v verb) []string {
	t.Helper()
	d := w.start(t, "", 0)
	w.arrange(t, d, v.from)
	d.forget(t)
	if err := v.perform(d.ctx(t), d.client()); err != nil {
		t.Fatalf("%s: %v", v.name, err)
	}
	var points []string
	if v.name == "prepare" {
		points = append(points, accepted)
	}
	for _, p := range d.points(t) {
		if strings.HasPrefix(p, v.name+"/") && !slices.Contains(points, p) {
			points = append(points, p)
		}
	}
	w.clear(t, d)
	d.stop(t)
	return points
}

// kill performs v, with a daemon that dies at point, and looks at the world
// afterwards. With a delay the daemon may have come further, or to the end.
func (w *world) kill(t *testing.T, v verb, point string, delay time.Duration) {
	t.Helper()
	d := w.start(t, "kill "+point, delay)
	before := w.arrange(t, d, v.from)
	c := d.client()
	if point == accepted {
		c.accepted = func() { time.AfterFunc(delay, func() { d.cmd.Process.Kill() }) }
	}
	v.perform(d.ctx(t), c) // the daemon dies under it
	d.waitDead(t)

	d = w.start(t, "", 0)
	after, err := d.client().vm(d.ctx(t))
	switch {
	case err != nil:
		t.Fatalf("after the kill: %v", err)
	case after == nil:
		if v.from != "none" && v.name != "rm" {
			t.Fatalf("the VM is gone, its disk with it")
		}
	case after.State == bangerv1.VM_RUNNING:
		if before != nil && before.State == bangerv1.VM_RUNNING && !maps.Equal(before.Handles, after.Handles) {
			t.Fatalf("it holds %v, and held %v", after.Handles, before.Handles)
		}
		if after.Problem != "" || after.Handles["guest boot id"] == "" {
			t.Fatalf("adopted with a problem: %q, %v", after.Problem, after.Handles)
		}
	case after.State != bangerv1.VM_STOPPED:
		t.Fatalf("the VM is %s: %s", after.State, after.LastError)
	}
	if v.after != nil {
		v.after(w, t, d, after)
	}
	w.usable(t, d, after, v.from != "none")
	w.clear(t, d)
	d.stop(t)
}

// fail performs v with an error at point and a daemon that lives.
func (w *world) fail(t *testing.T, v verb, point string) {
	t.Helper()
	d := w.start(t, "fail "+point, 0)
	w.arrange(t, d, v.from)
	err := v.perform(d.ctx(t), d.client())
	if err == nil {
		t.Fatalf("%s went well in spite of the failure", v.name)
	}
	if !strings.Contains(err.Error(), "injected") {
		t.Fatalf("%s: %v", v.name, err)
	}
	after, err := d.client().vm(d.ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	releasing := strings.Contains(point, "/release/")
	switch {
	case after == nil && v.from != "none":
		t.Fatal("the VM is gone")
	case after != nil && v.from == "none" && !releasing:
		t.Fatalf("a failed create left the VM %s", after.State)
	case after != nil && releasing && after.State != bangerv1.VM_FAILED && after.State != bangerv1.VM_DELETING:
		t.Fatalf("the VM is %s after a release that failed", after.State)
	case after != nil && !releasing && after.State != bangerv1.VM_STOPPED:
		t.Fatalf("the VM is %s: %s", after.State, after.LastError)
	}
	if after != nil && v.name != "rm" {
		// The injected failure happens once: stop runs the releases again.
		if err := d.client().do(d.ctx(t))(d.client().vms.Stop(d.ctx(t), &bangerv1.StopVMRequest{Ref: "v"})); err != nil {
			t.Fatalf("stop after the failure: %v", err)
		}
		w.usable(t, d, after, v.from != "none")
	}
	w.clear(t, d)
	d.stop(t)
}

// TestCancelEveryStep cancels create and start at each step: all is undone.
func TestCancelEveryStep(t *testing.T) {
	w := newWorld(t)
	for _, v := range verbs() {
		if v.name != "create" && v.name != "start" {
			continue // what releases is not undone
		}
		for _, point := range w.discover(t, v) {
			t.Run(point, func(t *testing.T) { w.cancel(t, v, point) })
		}
	}
}

func (w *world) cancel(t *testing.T, v verb, point string) {
	t.Helper()
	d := w.start(t, "pause "+point, 0)
	w.arrange(t, d, v.from)
	d.forget(t)
	ended := make(chan error, 1)
	go func() { ended <- v.perform(d.ctx(t), d.client()) }()
	d.waitPoint(t, point)
	c, ctx := d.client(), d.ctx(t)
	res, err := c.ops.List(ctx, &bangerv1.ListOperationsRequest{})
	if err != nil || res.Operations[0].State != bangerv1.Operation_RUNNING {
		t.Fatalf("operations: %v, %v", res, err)
	}
	if _, err := c.ops.Cancel(ctx, &bangerv1.CancelOperationRequest{Id: res.Operations[0].Id}); err != nil {
		t.Fatal(err)
	}
	d.resume(t)
	// At its very last step an operation may be through before it sees the cancel.
	if err := <-ended; err != nil && !strings.HasPrefix(err.Error(), "CANCELLED") {
		t.Fatalf("the cancelled %s: %v", v.name, err)
	} else if err != nil {
		after, verr := c.vm(ctx)
		switch {
		case verr != nil:
			t.Fatal(verr)
		case v.from == "none" && after != nil:
			t.Fatalf("the VM is %s", after.State)
		case v.from != "none" && (after == nil || after.State != bangerv1.VM_STOPPED):
			t.Fatalf("the VM is %v", after)
		}
		if text := w.host().Text(); text != "" {
			t.Fatalf("left on the host:\n%s", text)
		}
	}
	w.clear(t, d)
	d.stop(t)
}

// TestLease: a VM that is removed on release goes with its holder, stays through a
// shutdown of the daemon, and is removed when nobody holds it again.
func TestLease(t *testing.T) {
	w := newWorld(t)
	for range 5 {
		d := w.start(t, "", 0)
		c, ctx := d.client(), d.ctx(t)
		op, err := c.vms.Create(ctx, &bangerv1.CreateVMRequest{
			Name: "v", Ready: bangerv1.Ready_READY_AGENT, Cpus: 1, Memory: 256 << 20, Disk: 64 << 20, RemoveOnRelease: true,
		})
		if err := c.do(ctx)(op, err); err != nil {
			t.Fatal(err)
		}
		hold := func(d *process) context.CancelFunc {
			ctx, cancel := context.WithCancel(d.ctx(t))
			stream, err := d.client().vms.Hold(ctx, &bangerv1.HoldVMRequest{Ref: "v"})
			if err != nil || !stream.Receive() {
				t.Fatalf("hold: %v", err)
			}
			return cancel
		}
		hold(d)
		d.stop(t)
		d = w.start(t, "", 0)
		if vm, err := d.client().vm(d.ctx(t)); err != nil || vm.GetState() != bangerv1.VM_RUNNING {
			t.Fatalf("after a shutdown of the daemon: %v, %v", vm, err)
		}
		hold(d)()
		for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
			vm, err := d.client().vm(d.ctx(t))
			if err == nil && vm == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("nobody holds it: %v, %v", vm, err)
			}
		}
		w.clear(t, d)
		d.stop(t)
	}
}

// TestKillTakesOverStop: who does not want to wait for a slow guest need not.
func TestKillTakesOverStop(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	w.arrange(t, d, "running")
	if err := w.host().SetScenario("v", fake.NoShutdown); err != nil {
		t.Fatal(err)
	}
	c, ctx := d.client(), d.ctx(t)
	slow, err := c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v", TimeoutSeconds: 3600})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v", TimeoutSeconds: -1})); err != nil {
		t.Fatal(err)
	}
	if op := d.operation(t, slow.Id); op.State != bangerv1.Operation_CANCELLED && op.State != bangerv1.Operation_FAILED {
		t.Errorf("the slow stop is %s", op.State)
	}
	if vm, err := c.vm(ctx); err != nil || vm.State != bangerv1.VM_STOPPED {
		t.Errorf("%v, %v", vm, err)
	}
	for _, seconds := range []float64{1e11, math.NaN(), math.Inf(1)} {
		if _, err := c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v", TimeoutSeconds: seconds}); err == nil {
			t.Errorf("a timeout of %v s is taken", seconds)
		}
	}
	w.clear(t, d)
	d.stop(t)
}

// usable starts the VM that is there and looks at its disk; without one it makes one.
func (w *world) usable(t *testing.T, d *process, vm *bangerv1.VM, written bool) {
	t.Helper()
	c, ctx := d.client(), d.ctx(t)
	if vm == nil {
		if err := c.create(ctx, false); err != nil {
			t.Fatalf("create after the crash: %v", err)
		}
		return
	}
	if written {
		wantMarker(t, filepath.Join(w.state, "vms", vm.Id, "disk"))
	}
	if err := c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "v"})); err != nil {
		t.Fatalf("start after the crash: %v", err)
	}
}

// wantMarker holds that a disk has what the user wrote to it.
func wantMarker(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, len(marker))
	if _, err := f.ReadAt(got, 0); err != nil || string(got) != marker {
		t.Fatalf("the disk has lost what was written: %v, %q", err, got)
	}
}

// arrange brings the VM "v" into a state.
func (w *world) arrange(t *testing.T, d *process, state string) *bangerv1.VM {
	t.Helper()
	if state == "none" {
		return nil
	}
	c, ctx := d.client(), d.ctx(t)
	if err := c.create(ctx, true); err != nil {
		t.Fatalf("arrange: %v", err)
	}
	vm, err := c.vm(ctx)
	if err != nil || vm == nil {
		t.Fatalf("arrange: %v", err)
	}
	f, err := os.OpenFile(filepath.Join(w.state, "vms", vm.Id, "disk"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte(marker), 0); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if state == "running" {
		if err := c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "v", Ready: bangerv1.Ready_READY_AGENT})); err != nil && !d.dead() {
			t.Fatalf("arrange: %v", err)
		}
		if vm, err = c.vm(ctx); err != nil {
			t.Fatal(err)
		}
	}
	return vm
}

// clear removes the VM and holds that nothing is left of it: on the host, in the
// state directory, among the processes.
func (w *world) clear(t *testing.T, d *process) {
	t.Helper()
	c, ctx := d.client(), d.ctx(t)
	if vm, err := c.vm(ctx); err != nil {
		t.Fatal(err)
	} else if vm != nil {
		if err := c.do(ctx)(c.vms.Delete(ctx, &bangerv1.DeleteVMRequest{Ref: "v", Force: true})); err != nil {
			t.Fatalf("rm: %v", err)
		}
	}
	if text := w.host().Text(); text != "" {
		t.Fatalf("left on the host:\n%s", text)
	}
	for _, dir := range []string{"vms", "lost"} {
		if entries, err := os.ReadDir(filepath.Join(w.state, dir)); err == nil && len(entries) > 0 {
			t.Fatalf("left in %s: %v", dir, entries)
		}
	}
	wantNoProcesses(t, filepath.Join(w.state, "vms"))
}

// wantNoProcesses holds that no process works below one of dirs any more. Of a killed one
// the kernel lets go of the lock before the working directory.
func wantNoProcesses(t *testing.T, dirs ...string) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		var left []string
		for _, dir := range dirs {
			left = append(left, processesIn(dir)...)
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("processes left: %v", left)
		}
	}
}

// processesIn finds processes whose working directory lies below dir.
func processesIn(dir string) []string {
	var found []string
	links, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, link := range links {
		if cwd, err := os.Readlink(link); err == nil && strings.HasPrefix(cwd, dir) {
			found = append(found, filepath.Base(filepath.Dir(link)))
		}
	}
	return found
}

func TestMain(m *testing.M) {
	if os.Getenv(envState) != "" {
		if err := serve(); err != nil {
			slog.Error("the daemon failed", "err", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}
