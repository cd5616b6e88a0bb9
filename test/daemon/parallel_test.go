package daemon

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/driver/fake"
)

func (c *client) createNamed(ctx context.Context, name, hint string, start bool) (*bangerv1.VM, error) {
	op, err := c.vms.Create(ctx, &bangerv1.CreateVMRequest{
		Name: name, NameHint: hint, NoStart: !start, Ready: bangerv1.Ready_READY_AGENT, Cpus: 1, Memory: 256 << 20, Disk: 64 << 20,
	})
	if err != nil {
		return nil, err
	}
	if err := c.do(ctx)(op, nil); err != nil {
		return nil, err
	}
	stream, err := c.ops.Watch(ctx, &bangerv1.WatchOperationRequest{Id: op.Id})
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	if !stream.Receive() {
		return nil, fmt.Errorf("no result: %w", stream.Err())
	}
	return stream.Msg().GetVm(), nil
}

// TestParallelCreates: of 50 at once with one hint all get names and slots of their
// own; of 20 with one name exactly one wins.
func TestParallelCreates(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)

	var mu sync.Mutex
	names := make(map[string]bool)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			vm, err := c.createNamed(ctx, "", "shop", false)
			if err != nil {
				t.Errorf("create: %v", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if names[vm.Name] {
				t.Errorf("two VMs are named %s", vm.Name)
			}
			names[vm.Name] = true
		})
	}
	wg.Wait()
	for n := 2; n <= 50; n++ {
		if !names["shop-"+strconv.Itoa(n)] {
			t.Errorf("no VM is named shop-%d", n)
		}
	}
	slots := strings.Fields(w.sqlite(t, "select slot from vms order by slot"))
	for i, slot := range slots {
		if slot != strconv.Itoa(i+1) {
			t.Fatalf("slots: %v", slots)
		}
	}

	won := 0
	for range 20 {
		wg.Go(func() {
			_, err := c.createNamed(ctx, "one", "", false)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				won++
			case !strings.Contains(err.Error(), "exists"):
				t.Errorf("a loser was told: %v", err)
			}
		})
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("%d creates of one name won", won)
	}
	d.stop(t)
}

// TestStalledBootDelaysNobody: while one guest never answers, others are created,
// listed and stopped, faster than the stall could end.
func TestStalledBootDelaysNobody(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)
	if err := w.host().SetScenario("stalled", fake.Stall); err != nil {
		t.Fatal(err)
	}
	op, err := c.vms.Create(ctx, &bangerv1.CreateVMRequest{Name: "stalled", Cpus: 1, Memory: 256 << 20, Disk: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		if held, _ := filepath.Glob(filepath.Join(w.state, "vms/*/run/agent.sock")); len(held) > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the stalled VM does not come up")
		}
	}
	if _, err := c.createNamed(ctx, "lively", "", true); err != nil {
		t.Fatal(err)
	}
	if res, err := c.vms.List(ctx, &bangerv1.ListVMsRequest{}); err != nil || len(res.Vms) != 2 {
		t.Fatalf("list: %v, %v", res, err)
	}
	if err := c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "lively"})); err != nil {
		t.Fatal(err)
	}
	// The stall has lasted all the while. rm takes it over and leaves nothing.
	if now := d.operation(t, op.Id); now.State != bangerv1.Operation_RUNNING {
		t.Fatalf("the stalled create is %s: %s", now.State, now.Error)
	}
	if err := c.do(ctx)(c.vms.Delete(ctx, &bangerv1.DeleteVMRequest{Ref: "stalled", Force: true})); err != nil {
		t.Fatal(err)
	}
	if now := d.operation(t, op.Id); now.State != bangerv1.Operation_CANCELLED && now.State != bangerv1.Operation_FAILED {
		t.Fatalf("the create that was taken over is %s", now.State)
	}
	if text := w.host().Text(); text != "" {
		t.Fatalf("left on the host:\n%s", text)
	}
	d.stop(t)
}

// TestStalledPullDelaysNobody: while the image and the kernel are being made anew, and
// that does not get on, VMs of those that are here are created, started, listed, stopped
// and removed: all of it ends before the stall does.
func TestStalledPullDelaysNobody(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)
	if _, err := c.createNamed(ctx, "first", "", false); err != nil { // brings image and kernel here
		t.Fatal(err)
	}
	hold := w.state + ".hold"
	if err := os.WriteFile(hold, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	image, err := c.images.Pull(ctx, &bangerv1.PullImageRequest{Force: true})
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := c.kernels.Pull(ctx, &bangerv1.PullKernelRequest{Force: true})
	if err != nil {
		t.Fatal(err)
	}
	pulls := []*bangerv1.Operation{image, kernel}
	for _, pull := range pulls {
		for deadline := time.Now().Add(limit); d.operation(t, pull.Id).StepName != "download packages"; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the pull does not begin: %v", d.operation(t, pull.Id))
			}
		}
	}
	if _, err := c.createNamed(ctx, "lively", "", true); err != nil {
		t.Fatalf("create: %v", err)
	}
	if err := c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "first"})); err != nil {
		t.Fatalf("start: %v", err)
	}
	if res, err := c.vms.List(ctx, &bangerv1.ListVMsRequest{}); err != nil || len(res.Vms) != 2 {
		t.Fatalf("list: %v, %v", res, err)
	}
	if res, err := c.images.List(ctx, &bangerv1.ListImagesRequest{}); err != nil || len(res.Images) != 1 {
		t.Fatalf("image ls: %v, %v", res, err)
	}
	if res, err := c.kernels.List(ctx, &bangerv1.ListKernelsRequest{}); err != nil || len(res.Kernels) != 1 {
		t.Fatalf("kernel ls: %v, %v", res, err)
	}
	for _, name := range []string{"lively", "first"} {
		if err := c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: name})); err != nil {
			t.Fatalf("stop: %v", err)
		}
		if err := c.do(ctx)(c.vms.Delete(ctx, &bangerv1.DeleteVMRequest{Ref: name})); err != nil {
			t.Fatalf("rm: %v", err)
		}
	}
	for _, pull := range pulls {
		if now := d.operation(t, pull.Id); now.State != bangerv1.Operation_RUNNING {
			t.Errorf("the stalled pull of %s is %s: %s", now.Target, now.State, now.Error)
		}
	}
	if err := os.Remove(hold); err != nil {
		t.Fatal(err)
	}
	for _, pull := range pulls {
		if err := c.do(ctx)(pull, nil); err != nil {
			t.Errorf("the pull after the stall: %v", err)
		}
	}
	d.stop(t)
}

func (d *process) operation(t *testing.T, id string) *bangerv1.Operation {
	t.Helper()
	res, err := d.client().ops.List(d.ctx(t), &bangerv1.ListOperationsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, op := range res.Operations {
		if op.Id == id {
			return op
		}
	}
	t.Fatalf("no operation %s", id)
	return nil
}

// TestNothingTransientInStore: what a running VM holds is in no table, run/ goes with
// stop, log/ stays; and the daemon listens on no TCP port.
func TestNothingTransientInStore(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)
	if err := c.create(ctx, false); err != nil {
		t.Fatal(err)
	}
	vm, err := c.vm(ctx)
	if err != nil {
		t.Fatal(err)
	}
	dump := w.sqlite(t, ".dump")
	for what, value := range vm.Handles {
		if what == "directory" {
			continue
		}
		for _, line := range strings.Split(dump, "\n") {
			if strings.HasPrefix(line, "INSERT") && (strings.Contains(line, ","+value+",") || strings.Contains(line, "'"+value+"'")) {
				t.Errorf("%s %s is in the store: %s", what, value, line)
			}
		}
	}
	for _, word := range []string{"pid", "tap", "loop", "dm_"} {
		if strings.Contains(dump, word+" ") || strings.Contains(dump, word+"_name") {
			t.Errorf("the schema speaks of %q", word)
		}
	}
	if ports := listeningTCP(t, d.cmd.Process.Pid); len(ports) > 0 {
		t.Errorf("the daemon listens on TCP: %v", ports)
	}
	dir := filepath.Join(w.state, "vms", vm.Id)
	if err := c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v"})); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "run")); !os.IsNotExist(err) {
		t.Errorf("run/ after stop: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "log", "exit.json")); err != nil {
		t.Errorf("log/exit.json after stop: %v", err)
	}
	w.clear(t, d)
	d.stop(t)
}

// listeningTCP lists the sockets of a process that are in the tables of TCP listeners.
func listeningTCP(t *testing.T, pid int) []string {
	t.Helper()
	listeners := make(map[string]bool) // inode
	for _, table := range []string{"tcp", "tcp6"} {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		if err != nil {
			continue
		}
		for _, line := range strings.Split(string(data), "\n")[1:] {
			if f := strings.Fields(line); len(f) > 9 && f[3] == "0A" { // TCP_LISTEN
				listeners["socket:["+f[9]+"]"] = true
			}
		}
	}
	var found []string
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(links) == 0 {
		t.Fatalf("cannot look at the daemon's descriptors: %v", err)
	}
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && listeners[target] {
			found = append(found, target)
		}
	}
	return found
}

// TestManyRecords: ten times as many records cost the start of the daemon and a list about
// ten times as much at most, not a hundred. The figures themselves are the benchmark's.
func TestManyRecords(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)
	if _, err := c.createNamed(ctx, "first", "", false); err != nil {
		t.Fatal(err)
	}
	d.stop(t)
	w.addRecords(t, 2, 100)
	readyFew, listFew := w.records(t, 100)
	w.addRecords(t, 101, 1000)
	readyMany, listMany := w.records(t, 1000)
	t.Logf("100 and 1000 records: ready after %s and %s, listed in %s and %s", readyFew, readyMany, listFew, listMany)
	const most = 40 // in proportion is 10, in square 100
	if readyMany > most*readyFew || listMany > most*listFew {
		t.Errorf("10 times the records take more than %d times as long", most)
	}
}

// addRecords copies the record of the VM "first".
func (w *world) addRecords(t *testing.T, from, to int) {
	t.Helper()
	var sql bytes.Buffer
	sql.WriteString("begin;\ncreate temp table record as select * from vms where name='first';\n")
	for n := from; n <= to; n++ {
		fmt.Fprintf(&sql, "update record set id=printf('%%012x',%d), name='vm%d', slot=%d;\ninsert into vms select * from record;\n", n, n, n)
	}
	sql.WriteString("commit;\n")
	w.sqlite(t, sql.String())
}

// records returns how long a daemon with so many records takes to be ready, and to list
// them: the least of several times, which is what the work costs.
func (w *world) records(t *testing.T, want int) (ready, listed time.Duration) {
	t.Helper()
	ready, listed = limit, limit
	for range 3 {
		begun := time.Now()
		d := w.start(t, "", 0)
		ready = min(ready, time.Since(begun))
		for range 5 {
			begun = time.Now()
			res, err := d.client().vms.List(d.ctx(t), &bangerv1.ListVMsRequest{})
			listed = min(listed, time.Since(begun))
			if err != nil || len(res.Vms) != want {
				t.Fatalf("list: %d VMs, %v", len(res.GetVms()), err)
			}
		}
		d.stop(t)
	}
	return ready, listed
}

// sqlite runs SQL on the store by the sqlite3 of Python, which is everywhere: the
// dump must not come from the code that is tested.
func (w *world) sqlite(t *testing.T, sql string) string {
	t.Helper()
	const program = `
import sqlite3, sys
db = sqlite3.connect(sys.argv[1]); sql = sys.stdin.read()
if sql == ".dump":
    print("\n".join(db.iterdump()))
elif sql.startswith("select"):
    print("\n".join("|".join(map(str, r)) for r in db.execute(sql)))
else:
    db.executescript(sql)
`
	cmd := exec.Command("python3", "-c", program, filepath.Join(w.state, "banger.db"))
	cmd.Stdin = strings.NewReader(sql)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("sqlite: %v\n%s", err, stderr.String())
	}
	return string(out)
}
