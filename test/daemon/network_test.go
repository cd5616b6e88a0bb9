package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/store"
	"banger/internal/netwire"
	"banger/test/need"
)

// networked is a request for the VM "v" with a network.
func networked(n *bangerv1.Network) *bangerv1.CreateVMRequest {
	return &bangerv1.CreateVMRequest{
		Name: "v", Ready: bangerv1.Ready_READY_AGENT, Cpus: 1, Memory: 256 << 20, Disk: 64 << 20, Network: n,
	}
}

// detail finds the error as the daemon said it.
func detail(t *testing.T, err error) *bangerv1.ErrorDetail {
	t.Helper()
	var e *connect.Error
	if !errors.As(err, &e) || len(e.Details()) != 1 {
		t.Fatalf("no error of the daemon: %v", err)
	}
	value, err := e.Details()[0].Value()
	if err != nil {
		t.Fatal(err)
	}
	return value.(*bangerv1.ErrorDetail)
}

// wantError holds that err has a code, a message and a hint, the latter two in part.
func wantError(t *testing.T, err error, code api.Code, message, hint string) {
	t.Helper()
	d := detail(t, err)
	if d.Code != string(code) || !strings.Contains(d.Message, message) || !strings.Contains(d.Hint, hint) {
		t.Errorf("got %s: %s (%s)\nwant %s: …%s… (…%s…)", d.Code, d.Message, d.Hint, code, message, hint)
	}
}

// busyPort is a port of the loopback that is in use until release is called.
func busyPort(t *testing.T) (port int, release func()) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().(*net.TCPAddr).Port, func() { l.Close() }
}

func freePort(t *testing.T) int {
	port, release := busyPort(t)
	release()
	return port
}

func (w *world) vmDir(vm *bangerv1.VM) string { return filepath.Join(w.state, "vms", vm.Id) }

// inForce is what the network's process has taken over, nil before that.
func (w *world) inForce(vm *bangerv1.VM) *netwire.Config {
	data, err := os.ReadFile(filepath.Join(w.vmDir(vm), "run", "net.inforce"))
	var c netwire.Config
	if err != nil || json.Unmarshal(data, &c) != nil {
		return nil
	}
	return &c
}

// wantNetwork holds that the record, its mirror, net.json and the process of a running VM
// all say want.
func (w *world) wantNetwork(t *testing.T, d *process, want netwire.Network) {
	t.Helper()
	vm, err := d.client().vm(d.ctx(t))
	if err != nil || vm == nil {
		t.Fatalf("%v, %v", vm, err)
	}
	shown := netwire.Network{Preset: vm.Network.Preset, Allow: vm.Network.Allow, Deny: vm.Network.Deny, Publish: vm.Network.Publish}
	if diff := cmp.Diff(want, shown); diff != "" {
		t.Errorf("the record: %s", diff)
	}
	var rec store.VM
	data, err := os.ReadFile(filepath.Join(w.vmDir(vm), "record.json"))
	if err == nil {
		err = json.Unmarshal(data, &rec)
	}
	if diff := cmp.Diff(want, rec.Network); err != nil || diff != "" {
		t.Errorf("record.json: %v, %s", err, diff)
	}
	if vm.State != bangerv1.VM_RUNNING {
		return
	}
	// A daemon that has just been opened brings it into force in the background.
	var diff string
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		c, err := netwire.ReadConfig(w.vmDir(vm))
		if err != nil {
			t.Fatal(err)
		}
		diff = cmp.Diff(want, c.Network)
		if force := w.inForce(vm); force == nil {
			diff += "nothing is in force"
		} else {
			diff += cmp.Diff(want, force.Network)
		}
		if diff == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("net.json and what is in force: %s", diff)
		}
	}
}

// TestNetworkOfAVM: what create asks for is in force, is shown, goes with the run, and comes
// back with the next.
func TestNetworkOfAVM(t *testing.T) {
	w := newNetworkWorld(t)
	d := w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)
	port := freePort(t)
	err := c.do(ctx)(c.vms.Create(ctx, networked(&bangerv1.Network{
		Allow: []string{"GitHub.com:443"}, Deny: []string{"203.0.113.0/24"}, Publish: []string{fmt.Sprintf("%d:80", port)},
	})))
	if err != nil {
		t.Fatal(err)
	}
	want := netwire.Network{Preset: "internet", Allow: []string{"github.com:443"}, Deny: []string{"203.0.113.0/24"},
		Publish: []string{fmt.Sprintf("127.0.0.1:%d:80/tcp", port)}}
	w.wantNetwork(t, d, want)
	vm, err := c.vm(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if vm.Traffic.GetRefused() != 7 || vm.Traffic.GetConnections() != 1 || vm.Traffic.GetProblem() != "" {
		t.Errorf("traffic: %v", vm.Traffic)
	}
	mac := w.inForce(vm).MAC
	conn, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatalf("the published port: %v", err)
	}
	conn.Close()

	if err := c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v"})); err != nil {
		t.Fatal(err)
	}
	if conn, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
		conn.Close()
		t.Error("the port is open after the stop")
	}
	if vm, err = c.vm(ctx); err != nil || vm.Traffic != nil {
		t.Errorf("stopped: %v, %v", vm.GetTraffic(), err)
	}
	if err := c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "v"})); err != nil {
		t.Fatal(err)
	}
	w.wantNetwork(t, d, want)
	if again := w.inForce(vm).MAC; again != mac || mac == "" {
		t.Errorf("the MAC was %q and is %q", mac, again)
	}
	w.clear(t, d)
	d.stop(t)
}

// TestWithoutNetwork: a VMM that has no network runs VMs all the same, but for who asks for
// one.
func TestWithoutNetwork(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)
	for _, n := range []*bangerv1.Network{{Preset: "lan"}, {Publish: []string{"80:80"}}, {Preset: "none", Allow: []string{"a.test"}}, {Preset: "none", Deny: []string{"a.test"}}} {
		_, err := c.vms.Create(ctx, networked(n))
		wantError(t, err, api.Refused, "VMs have no network here", "banger doctor")
	}
	if err := c.do(ctx)(c.vms.Create(ctx, networked(nil))); err != nil {
		t.Fatal(err)
	}
	_, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Preset: "internet"})
	wantError(t, err, api.Refused, "VMs have no network here", "banger doctor")
	vm, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Preset: "none", Deny: []string{"a.test"}})
	if err != nil || vm.State != bangerv1.VM_RUNNING || vm.Network.Preset != "none" {
		t.Errorf("%v, %v", vm, err)
	}
	w.clear(t, d)
	d.stop(t)
}

// TestPortsBeforeTheStart: what the host does not give is an error before a VM is there, or
// before it starts, and names a way out.
func TestPortsBeforeTheStart(t *testing.T) {
	w := newNetworkWorld(t)
	d := w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)
	port, release := busyPort(t)
	busy := fmt.Sprintf("%d:80", port)
	for _, bad := range []struct {
		network       *bangerv1.Network
		code          api.Code
		message, hint string
	}{
		{&bangerv1.Network{Publish: []string{busy}}, api.Busy, fmt.Sprintf("port 127.0.0.1:%d is in use", port), "banger create -p "},
		{&bangerv1.Network{Publish: []string{"192.0.2.7:8080:80"}}, api.Invalid, "192.0.2.7 is no address of this host", ""},
		{&bangerv1.Network{Publish: []string{"8080:80", "8080:81"}}, api.Invalid, "127.0.0.1:8080", "banger set --help"},
		{&bangerv1.Network{Publish: []string{"0:80"}}, api.Invalid, "is no port", "banger set --help"},
		{&bangerv1.Network{Allow: []string{"10.0.0.0/33"}}, api.Invalid, "column", "banger set --help"},
		{&bangerv1.Network{Preset: "wan"}, api.Invalid, "wan", "banger set --help"},
	} {
		_, err := c.vms.Create(ctx, networked(bad.network))
		wantError(t, err, bad.code, bad.message, bad.hint)
		if vm, err := c.vm(ctx); err != nil || vm != nil {
			t.Fatalf("%v: there is a VM: %v, %v", bad.network, vm, err)
		}
	}
	// One that is not started asks for no port yet.
	r := networked(&bangerv1.Network{Publish: []string{busy}})
	r.NoStart = true
	if err := c.do(ctx)(c.vms.Create(ctx, r)); err != nil {
		t.Fatal(err)
	}
	start := func() error { return c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "v"})) }
	if err := start(); err == nil || !strings.Contains(err.Error(), "is in use") {
		t.Errorf("start: %v", err)
	}
	res, err := c.ops.List(ctx, &bangerv1.ListOperationsRequest{})
	if err != nil || res.Operations[0].Error.GetHint() != fmt.Sprintf("banger set v --unpublish %d", port) {
		t.Errorf("the hint: %v, %v", res, err)
	}
	if vm, err := c.vm(ctx); err != nil || vm.State != bangerv1.VM_STOPPED || !strings.Contains(vm.LastError, "is in use") {
		t.Errorf("%v, %v", vm, err)
	}
	release()
	if err := start(); err != nil {
		t.Errorf("with the port free: %v", err)
	}
	w.clear(t, d)
	d.stop(t)
}

// TestPortsTakenMeanwhile: of two VMs that publish the same port and start at once, one
// starts, and the other says why not.
func TestPortsTakenMeanwhile(t *testing.T) {
	w := newNetworkWorld(t)
	d := w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)
	port, release := busyPort(t)
	release()
	for _, name := range []string{"v", "u"} {
		r := networked(&bangerv1.Network{Publish: []string{fmt.Sprintf("%d:80", port)}})
		r.Name, r.NoStart = name, true
		if err := c.do(ctx)(c.vms.Create(ctx, r)); err != nil {
			t.Fatal(err)
		}
	}
	for round := range 3 {
		failed := make(chan error, 2)
		for _, name := range []string{"v", "u"} {
			go func() { failed <- c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: name})) }()
		}
		first, second := <-failed, <-failed
		err := errors.Join(first, second)
		if (first == nil) == (second == nil) || err != nil && !strings.Contains(err.Error(), "in use") {
			t.Errorf("round %d: %v, and %v", round, first, second)
		}
		for _, name := range []string{"v", "u"} {
			if err := c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: name})); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, name := range []string{"v", "u"} {
		if err := c.do(ctx)(c.vms.Delete(ctx, &bangerv1.DeleteVMRequest{Ref: name, Force: true})); err != nil {
			t.Fatal(err)
		}
	}
	d.stop(t)
}

// TestPortOfAnotherVM: who wants a port that another VM has is told which one, whenever it
// comes out.
func TestPortOfAnotherVM(t *testing.T) {
	const point = "start/network/acquire/before"
	w := newNetworkWorld(t)
	d := w.start(t, "pause "+point, 0)
	c, ctx := d.client(), d.ctx(t)
	if err := c.do(ctx)(c.vms.Create(ctx, networked(nil))); err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	busy := fmt.Sprintf("port 127.0.0.1:%d is in use by the VM v", port)
	wanted := &bangerv1.Network{Publish: []string{fmt.Sprintf("%d:80", port)}}
	other := networked(wanted)
	other.Name, other.NoStart = "u", true
	if err := c.do(ctx)(c.vms.Create(ctx, other)); err != nil {
		t.Fatal(err)
	}
	// The port was free when u was about to start.
	failed := make(chan error, 1)
	go func() { failed <- c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "u"})) }()
	d.waitPoint(t, point)
	if _, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Publish: []string{fmt.Sprintf("0.0.0.0:%d:80", port)}}); err != nil {
		t.Fatal(err)
	}
	d.resume(t)
	for _, when := range []string{"meanwhile", "before"} {
		if when == "before" {
			failed <- c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "u"}))
		}
		if err := <-failed; err == nil || !strings.Contains(err.Error(), busy) {
			t.Errorf("%s: %v", when, err)
		}
		res, err := c.ops.List(ctx, &bangerv1.ListOperationsRequest{})
		if err != nil || res.Operations[0].Error.GetHint() != fmt.Sprintf("banger set u --unpublish %d", port) {
			t.Errorf("%s: the hint: %v, %v", when, res.Operations[0].Error, err)
		}
	}
	third := networked(wanted)
	third.Name = "x"
	_, err := c.vms.Create(ctx, third)
	wantError(t, err, api.Busy, busy, "banger create -p ")
	if _, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "u", Unpublish: []string{strconv.Itoa(port)}}); err != nil {
		t.Fatal(err)
	}
	if err := c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "u"})); err != nil {
		t.Fatal(err)
	}
	_, err = c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "u", Publish: wanted.Publish})
	wantError(t, err, api.Busy, busy, "banger set u -p ")
	for _, name := range []string{"v", "u"} {
		if err := c.do(ctx)(c.vms.Delete(ctx, &bangerv1.DeleteVMRequest{Ref: name, Force: true})); err != nil {
			t.Fatal(err)
		}
	}
	d.stop(t)
}

// TestSetWhileItRuns: a change is in force at once and stays; one that is refused has
// changed nothing.
func TestSetWhileItRuns(t *testing.T) {
	w := newNetworkWorld(t)
	d := w.start(t, "fail set/network/reload/effect", 0)
	c, ctx := d.client(), d.ctx(t)
	first, second := freePort(t), freePort(t)
	if err := c.do(ctx)(c.vms.Create(ctx, networked(&bangerv1.Network{Allow: []string{"192.168.1.1:80"}, Publish: []string{fmt.Sprintf("%d:80", first)}}))); err != nil {
		t.Fatal(err)
	}
	published := func(port int) string { return fmt.Sprintf("127.0.0.1:%d:80/tcp", port) }
	was := netwire.Network{Preset: "internet", Allow: []string{"192.168.1.1:80"}, Publish: []string{published(first)}}
	change := &bangerv1.SetVMRequest{
		Ref: "v", Preset: "lan", Deny: []string{"192.168.1.1:80"}, Allow: []string{"*.test"},
		Publish: []string{fmt.Sprintf("%d:80", second)}, Unpublish: []string{strconv.Itoa(first)},
	}
	// The daemon was told to fail between the reload and the record.
	_, err := c.vms.Set(ctx, change)
	wantError(t, err, api.Internal, "injected", "")
	w.wantNetwork(t, d, was)
	vm, err := c.vms.Set(ctx, change)
	if err != nil {
		t.Fatal(err)
	}
	now := netwire.Network{Preset: "lan", Allow: []string{"*.test"}, Deny: []string{"192.168.1.1:80"}, Publish: []string{published(second)}}
	if vm.Network.GetPreset() != "lan" || vm.Traffic.GetConnections() != 1 {
		t.Errorf("the answer: %v, %v", vm.Network, vm.Traffic)
	}
	w.wantNetwork(t, d, now)

	busy, _ := busyPort(t)
	for _, bad := range []struct {
		request       *bangerv1.SetVMRequest
		code          api.Code
		message, hint string
	}{
		{&bangerv1.SetVMRequest{Preset: "none", Publish: []string{fmt.Sprintf("%d:80", busy)}}, api.Busy, fmt.Sprintf("127.0.0.1:%d is in use", busy), "banger set v -p "},
		{&bangerv1.SetVMRequest{Publish: []string{"192.0.2.7:1:1"}}, api.Invalid, "no address of this host", ""},
		{&bangerv1.SetVMRequest{Publish: []string{fmt.Sprintf("%d:81", second)}}, api.Invalid, "cannot lead to 81", "banger set --help"},
		{&bangerv1.SetVMRequest{Allow: []string{"tcp:"}}, api.Invalid, "column", "banger set --help"},
		{&bangerv1.SetVMRequest{Forget: []string{"absent.test"}}, api.NotFound, "the rules are *.test, 192.168.1.1:80", "banger set --help"},
		{&bangerv1.SetVMRequest{Unpublish: []string{"1"}}, api.NotFound, published(second), "banger set --help"},
	} {
		bad.request.Ref = "v"
		_, err := c.vms.Set(ctx, bad.request)
		wantError(t, err, bad.code, bad.message, bad.hint)
		w.wantNetwork(t, d, now)
	}
	_, err = c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "absent", Preset: "none"})
	wantError(t, err, api.NotFound, "absent", "")

	// The other rule goes, and it holds for the next start and the next daemon.
	if _, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Forget: []string{"*.TEST", "192.168.1.1:80"}}); err != nil {
		t.Fatal(err)
	}
	d.stop(t)
	d = w.start(t, "", 0)
	w.wantNetwork(t, d, netwire.Network{Preset: "lan", Publish: []string{published(second)}})
	w.clear(t, d)
	d.stop(t)
}

// TestSetRefusedByTheProcess: somebody takes the port after the daemon has tried it.
func TestSetRefusedByTheProcess(t *testing.T) {
	w := newNetworkWorld(t)
	d := w.start(t, "pause set/network/reload/before", 0)
	c, ctx := d.client(), d.ctx(t)
	if err := c.create(ctx, false); err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	failed := make(chan error, 1)
	go func() {
		_, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Preset: "none", Publish: []string{fmt.Sprintf("%d:80", port)}})
		failed <- err
	}()
	d.waitPoint(t, "set/network/reload/before")
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d.resume(t)
	wantError(t, <-failed, api.Busy, fmt.Sprintf("port 127.0.0.1:%d is in use", port), "banger set v -p ")
	w.wantNetwork(t, d, netwire.Network{Preset: "internet"})
	w.clear(t, d)
	d.stop(t)
}

// TestSetAtOnce: of many changes none is lost.
func TestSetAtOnce(t *testing.T) {
	w := newNetworkWorld(t)
	d := w.start(t, "", 0)
	for _, noStart := range []bool{true, false} {
		c, ctx := d.client(), d.ctx(t)
		if err := c.create(ctx, noStart); err != nil {
			t.Fatal(err)
		}
		var want []string
		var all sync.WaitGroup
		for n := range 12 {
			rule := fmt.Sprintf("host%02d.test", n)
			want = append(want, rule)
			all.Go(func() {
				if _, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Allow: []string{rule}}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		vm, err := c.vm(ctx)
		if err != nil {
			t.Fatal(err)
		}
		got := slices.Sorted(slices.Values(vm.Network.Allow))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		w.wantNetwork(t, d, netwire.Network{Preset: "internet", Allow: vm.Network.Allow})
		w.clear(t, d)
	}
	d.stop(t)
}

// TestSetKilled: the daemon dies at each step of a change. The next one has the old or the
// new network, everywhere the same, and a change that was answered stays.
func TestSetKilled(t *testing.T) {
	w := newNetworkWorld(t)
	was, now := netwire.Network{Preset: "internet"}, netwire.Network{Preset: "none", Allow: []string{"github.com"}}
	for _, step := range []struct {
		point string
		want  netwire.Network
	}{
		{"set/network/reload/before", was},
		{"set/network/reload/effect", was},
		{"set/network/record/effect", now},
	} {
		t.Run(step.point, func(t *testing.T) {
			d := w.start(t, "kill "+step.point, 0)
			w.arrange(t, d, "running")
			d.client().vms.Set(d.ctx(t), &bangerv1.SetVMRequest{Ref: "v", Preset: "none", Allow: []string{"github.com"}})
			d.waitDead(t)
			d = w.start(t, "", 0)
			w.wantNetwork(t, d, step.want)
			w.clear(t, d)
			d.stop(t)
		})
	}
}

// TestSetOnAFullDisk: the disk is full when a change is in force and not yet in the record.
// Then it is taken back as a whole, which needs no room.
func TestSetOnAFullDisk(t *testing.T) {
	need.Need(t, "root")
	const point = "set/network/reload/effect"
	w := newNetworkWorld(t)
	if err := os.Mkdir(w.state, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("none", w.state, "tmpfs", 0, "size=96m,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(w.state, syscall.MNT_DETACH) })
	d := w.start(t, "pause "+point, 0)
	w.arrange(t, d, "running")
	var rules []string
	for n := range 250 {
		rules = append(rules, fmt.Sprintf("host%03d.%s.test", n, strings.Repeat("x", 60)))
	}
	c, ctx := d.client(), d.ctx(t)
	failed := make(chan error, 1)
	go func() {
		_, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Preset: "none", Allow: rules})
		failed <- err
	}()
	d.waitPoint(t, point)
	filler, err := os.Create(filepath.Join(w.state, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	for err == nil {
		_, err = filler.Write(make([]byte, 4096))
	}
	d.resume(t)
	wantError(t, <-failed, api.NoSpace, "", "df -h ")
	w.wantNetwork(t, d, netwire.Network{Preset: "internet"})
	if err := os.Remove(filler.Name()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Preset: "none", Allow: rules[:1]}); err != nil {
		t.Fatal(err)
	}
	w.wantNetwork(t, d, netwire.Network{Preset: "none", Allow: rules[:1]})
	w.clear(t, d)
	d.stop(t)
}

// TestSetWhileItStarts: a change that comes in the middle of a start is not lost to what the
// start read before.
func TestSetWhileItStarts(t *testing.T) {
	w := newNetworkWorld(t)
	for _, point := range []string{"start/network/acquire/before", "start/network/acquire/effect", "start/agent/acquire/before"} {
		d := w.start(t, "pause "+point, 0)
		w.arrange(t, d, "stopped")
		d.forget(t)
		c, ctx := d.client(), d.ctx(t)
		started := make(chan error, 1)
		go func() {
			started <- c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "v", Ready: bangerv1.Ready_READY_AGENT}))
		}()
		d.waitPoint(t, point)
		if _, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Preset: "host"}); err != nil {
			t.Errorf("%s: %v", point, err)
		}
		d.resume(t)
		if err := <-started; err != nil {
			t.Errorf("%s: %v", point, err)
		}
		w.wantNetwork(t, d, netwire.Network{Preset: "host"})
		w.clear(t, d)
		d.stop(t)
		if err := os.Remove(w.state + ".go"); err != nil {
			t.Fatal(err)
		}
	}
}

// netPID is the pid of the network's process of a running VM.
func (w *world) netPID(t *testing.T, vm *bangerv1.VM) int {
	t.Helper()
	for _, pid := range processesIn(w.vmDir(vm)) {
		if name, _ := os.ReadFile("/proc/" + pid + "/cmdline"); strings.HasPrefix(string(name), "banger-net\x00") {
			n, err := strconv.Atoi(pid)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("the network's process is not there")
	return 0
}

// TestNetworkProcessAway: one that was killed is back for the next change; one that hangs
// keeps nobody waiting, and a change that it does not confirm is none.
func TestNetworkProcessAway(t *testing.T) {
	w := newNetworkWorld(t)
	d := w.start(t, "", 0)
	vm := w.arrange(t, d, "running")
	c, ctx := d.client(), d.ctx(t)
	if err := syscall.Kill(w.netPID(t, vm), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Preset: "lan"}); err != nil {
		t.Fatalf("after the kill: %v", err)
	}
	w.wantNetwork(t, d, netwire.Network{Preset: "lan"})
	pid := w.netPID(t, vm)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(pid, syscall.SIGCONT)
	if vm, err := c.vm(ctx); err != nil || vm.Traffic.GetProblem() != "its process does not answer" {
		t.Errorf("show: %v, %v", vm.GetTraffic(), err)
	}
	_, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Preset: "none"})
	wantError(t, err, api.Unresponsive, "cannot change the network of v: its network does not answer", "banger show v")
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if _, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Allow: []string{"a.test"}}); err != nil {
		t.Fatal(err)
	}
	w.wantNetwork(t, d, netwire.Network{Preset: "lan", Allow: []string{"a.test"}})
	w.clear(t, d)
	d.stop(t)
}

// TestSetWhileTheProcessIsAway: the change is stored, and in force when it is back. One that
// cannot be written is none, and is said once.
func TestSetWhileTheProcessIsAway(t *testing.T) {
	w := newNetworkWorld(t)
	d := w.start(t, "", 0)
	vm := w.arrange(t, d, "running")
	c, ctx := d.client(), d.ctx(t)
	temp := filepath.Join(w.vmDir(vm), netwire.ConfigFile+".new")
	if err := os.Symlink("/dev/full", temp); err != nil {
		t.Fatal(err)
	}
	_, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Preset: "none"})
	wantError(t, err, api.NoSpace, "no space left on device", "df -h ")
	if n := strings.Count(detail(t, err).Message, "no space"); n != 1 {
		t.Errorf("said %d times: %v", n, err)
	}
	w.wantNetwork(t, d, netwire.Network{Preset: "internet"})

	// It ends as often as it is started: it cannot listen.
	socket := filepath.Join(w.vmDir(vm), netwire.ControlSocket)
	if err := os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(socket, "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(w.netPID(t, vm), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	vm, err = c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Preset: "lan"})
	if err != nil || vm.Network.Preset != "lan" || !strings.Contains(vm.Traffic.GetProblem(), "in force when it is back") {
		t.Errorf("%v, %v", vm, err)
	}
	if err := os.RemoveAll(socket); err != nil {
		t.Fatal(err)
	}
	w.wantNetwork(t, d, netwire.Network{Preset: "lan"})
	w.clear(t, d)
	d.stop(t)
}

// TestNetworkOfAnEarlierRelease: a VM that ran before there was a network, and one whose
// record cannot be read.
func TestNetworkOfAnEarlierRelease(t *testing.T) {
	w := newNetworkWorld(t)
	w.network = false
	d := w.start(t, "", 0)
	vm := w.arrange(t, d, "running")
	d.stop(t)
	if err := os.Remove(filepath.Join(w.vmDir(vm), netwire.ConfigFile)); err != nil {
		t.Fatal(err)
	}
	w.network = true
	d = w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)
	vm, err := c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Preset: "lan"})
	if err != nil || !strings.Contains(vm.Traffic.GetProblem(), "earlier release") || vm.Network.Preset != "lan" {
		t.Fatalf("%v, %v", vm, err)
	}
	restart := func() {
		if err := c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v"})); err != nil {
			t.Fatal(err)
		}
		if err := c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "v", Ready: bangerv1.Ready_READY_AGENT})); err != nil {
			t.Fatal(err)
		}
	}
	restart()
	w.wantNetwork(t, d, netwire.Network{Preset: "lan"})

	w.sqlite(t, `update vms set network = '{"preset":';`)
	restart()
	if vm, err = c.vm(ctx); err != nil || vm.Network.Preset != "none" || !strings.Contains(vm.Problem, "cannot be understood") {
		t.Errorf("damaged: %v, %v", vm, err)
	}
	if force := w.inForce(vm); force == nil || force.Preset != "none" {
		t.Errorf("in force: %v", force)
	}
	if vm, err = c.vms.Set(ctx, &bangerv1.SetVMRequest{Ref: "v", Preset: "internet"}); err != nil || vm.Problem != "" {
		t.Errorf("set: %v, %v", vm, err)
	}
	w.wantNetwork(t, d, netwire.Network{Preset: "internet"})
	w.clear(t, d)
	d.stop(t)
}

// TestNetworkLog: the log is followed through a rotation and ends with the VM.
func TestNetworkLog(t *testing.T) {
	w := newNetworkWorld(t)
	d := w.start(t, "", 0)
	vm := w.arrange(t, d, "running")
	c, ctx := d.client(), d.ctx(t)
	log := filepath.Join(w.vmDir(vm), netwire.LogFile)
	write := func(reason string) {
		t.Helper()
		f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := fmt.Fprintf(f, "{\"at\":\"2026-11-24T12:04:11Z\",\"protocol\":\"tcp\",\"target\":\"192.168.1.1:80\",\"name\":\"a\\u001b[31m\",\"reason\":%q,\"count\":2}\n", reason); err != nil {
			t.Fatal(err)
		}
	}
	write("one")
	stream, err := c.vms.NetworkLog(ctx, &bangerv1.NetworkLogRequest{Ref: "v", Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	next := func() string {
		t.Helper()
		if !stream.Receive() {
			t.Fatalf("the log ends: %v", stream.Err())
		}
		return stream.Msg().Reason
	}
	if got := next(); got != "one" || stream.Msg().Name != "a[31m" || stream.Msg().Count != 2 || stream.Msg().At.AsTime().Year() != 2026 {
		t.Errorf("got %v", stream.Msg())
	}
	write("two")
	if err := os.Rename(log, filepath.Join(w.vmDir(vm), netwire.LogOld)); err != nil {
		t.Fatal(err)
	}
	write("three")
	if two, three := next(), next(); two != "two" || three != "three" {
		t.Errorf("%s, %s", two, three)
	}
	once, err := c.vms.NetworkLog(ctx, &bangerv1.NetworkLogRequest{Ref: "v"})
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for once.Receive() {
		all = append(all, once.Msg().Reason)
	}
	once.Close()
	if diff := cmp.Diff([]string{"one", "two", "three"}, all); diff != "" || once.Err() != nil {
		t.Errorf("%s, %v", diff, once.Err())
	}
	w.clear(t, d)
	if stream.Receive() || stream.Err() != nil {
		t.Errorf("after rm: %v, %v", stream.Msg(), stream.Err())
	}
	d.stop(t)
}

// TestPortsOfAVM: publications are listed whether or not the guest can be asked.
func TestPortsOfAVM(t *testing.T) {
	w := newNetworkWorld(t)
	d := w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)
	port := freePort(t)
	r := networked(&bangerv1.Network{Publish: []string{fmt.Sprintf("%d:1/udp", port)}})
	r.NoStart = true
	if err := c.do(ctx)(c.vms.Create(ctx, r)); err != nil {
		t.Fatal(err)
	}
	published := func(ports []*bangerv1.Port) bool {
		return slices.ContainsFunc(ports, func(p *bangerv1.Port) bool {
			return p.Protocol == "udp" && p.GuestPort == 1 && p.Published == fmt.Sprintf("127.0.0.1:%d", port)
		})
	}
	res, err := c.vms.Ports(ctx, &bangerv1.PortsRequest{Ref: "v"})
	if err != nil || len(res.Ports) != 1 || !published(res.Ports) || !strings.Contains(res.Error, "v is not running") {
		t.Errorf("stopped: %v, %v", res, err)
	}
	if err := c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "v", Ready: bangerv1.Ready_READY_AGENT})); err != nil {
		t.Fatal(err)
	}
	if res, err = c.vms.Ports(ctx, &bangerv1.PortsRequest{Ref: "v"}); err != nil || !published(res.Ports) {
		t.Errorf("running: %v, %v", res, err)
	}
	t.Logf("the guest: %v", res)
	w.clear(t, d)
	d.stop(t)
}
