package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/config"
	"banger/internal/daemon"
	"banger/internal/daemon/driver/fake"
	"banger/internal/daemon/image/imagetest"
	"banger/internal/daemon/locks"
	"banger/internal/daemon/opstate"
	"banger/internal/guest/wire"
)

// What the daemon process is told, in its environment.
const (
	envState    = "BANGER_CRASH_STATE"
	envHost     = "BANGER_CRASH_HOST"
	envPrograms = "BANGER_CRASH_PROGRAMS"
	envOrder    = "BANGER_CRASH_ORDER" // "kill POINT", "fail POINT" or "pause POINT"
	envDelay    = "BANGER_CRASH_DELAY"
	envNetwork  = "BANGER_CRASH_NETWORK" // anything: VMs have a network
)

// limit bounds every wait; nothing here should take a tenth of it.
const limit = 60 * time.Second

// serve is the daemon process.
func serve() error {
	o, err := parseOrder(os.Getenv(envOrder), os.Getenv(envDelay))
	if err != nil {
		return err
	}
	programs := os.Getenv(envPrograms)
	onHost := fake.New(os.Getenv(envHost), filepath.Join(programs, "fakevmm"))
	onHost.Ability.Network = os.Getenv(envNetwork) != ""
	host := onHost.Drivers()
	host.VMM = cutVMM{host.VMM, o.at}
	ctx := context.Background()
	d, err := daemon.Open(ctx,
		daemon.WithLayout(config.Layout{Root: os.Getenv(envState)}),
		daemon.WithPrograms(os.DirFS(programs)),
		daemon.WithHost(host),
		daemon.WithImageBuilder(&stamped{imagetest.Builder{Before: waitWhileHeld}}),
		daemon.WithChecker(locks.NewChecker()),
		daemon.WithLogger(slog.New(slog.NewTextHandler(os.Stderr, nil))),
		daemon.WithAgentTimeout(limit/2),
		daemon.WithHook(o.at),
	)
	if err != nil {
		return err
	}
	return errors.Join(d.Serve(ctx), d.Close())
}

// waitWhileHeld keeps the making of images and kernels from going on while there is a
// file "hold" beside the state directory.
func waitWhileHeld(ctx context.Context, _, _ string, _ opstate.Progress) error {
	for {
		if _, err := os.Stat(os.Getenv(envState) + ".hold"); err != nil {
			return nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// order is what happens at one point, once.
type order struct {
	fail, kill, pause bool
	point             string
	delay             time.Duration
	log               *os.File
}

func parseOrder(text, delay string) (*order, error) {
	o := &order{}
	what, point, _ := strings.Cut(text, " ")
	o.fail, o.kill, o.pause, o.point = what == "fail", what == "kill", what == "pause", point
	var err error
	if delay != "" {
		if o.delay, err = time.ParseDuration(delay); err != nil {
			return nil, err
		}
	}
	o.log, err = os.OpenFile(os.Getenv(envState)+".points", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	return o, err
}

func (o *order) at(point string) error {
	fmt.Fprintln(o.log, point)
	if point != o.point {
		return nil
	}
	switch {
	case o.kill && o.delay == 0:
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case o.kill:
		time.AfterFunc(o.delay, func() { syscall.Kill(os.Getpid(), syscall.SIGKILL) })
	case o.pause:
		for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if _, err := os.Stat(os.Getenv(envState) + ".go"); err == nil {
				break
			}
		}
	case o.fail:
		o.fail = false
		return errors.New("injected")
	}
	return nil
}

// world is a state directory and a fake host that outlive the daemons, and a
// repository that no daemon may change.
type world struct {
	state, hostDir, programs string
	network                  bool // VMs have one

	repository string
	untouched  string // what was in it from the beginning
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{state: filepath.Join(dir, "state"), hostDir: filepath.Join(dir, "host"), programs: filepath.Join(dir, "bin"), repository: filepath.Join(dir, "shop")}
	for name, pkg := range map[string]string{
		"banger-shim": "banger/cmd/banger-shim", "fakevmm": "banger/test/fakevmm/ownroot", "fakevmm.real": "banger/test/fakevmm",
		"banger-net": "banger/test/fakenet",
	} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(w.programs, name), pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build %s: %v\n%s", pkg, err, out)
		}
	}
	// The fake VMM boots no guest: what it is given for /init is never run.
	if err := os.WriteFile(filepath.Join(w.programs, "banger-guest"), []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	w.makeRepository(t)
	t.Cleanup(func() { // of a test that failed
		for _, pid := range processesIn(w.state) {
			if n, err := strconv.Atoi(pid); err == nil {
				syscall.Kill(n, syscall.SIGKILL)
			}
		}
	})
	return w
}

// newNetworkWorld is a world in which the VMM has a card to offer, and test/fakenet serves it.
func newNetworkWorld(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.network = true
	return w
}

func (w *world) host() *fake.Host { return fake.New(w.hostDir, "") }

// process is one daemon.
type process struct {
	w    *world
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	log  *os.File
}

// start starts a daemon and returns when it serves.
func (w *world) start(t *testing.T, order string, delay time.Duration) *process {
	t.Helper()
	log, err := os.Create(w.state + ".log")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envState+"="+w.state, envHost+"="+w.hostDir, envPrograms+"="+w.programs,
		envOrder+"="+order, envDelay+"="+delay.String(), "BANGER_CONFIG=")
	if w.network {
		cmd.Env = append(cmd.Env, envNetwork+"=1")
	}
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d := &process{w: w, cmd: cmd, done: make(chan struct{}), log: log}
	go func() { cmd.Wait(); close(d.done) }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-d.done
		log.Close()
		if data, err := os.ReadFile(log.Name()); t.Failed() && err == nil {
			t.Logf("the last daemon's log:\n%s", data)
			os.Remove(log.Name())
		}
	})
	deadline := time.Now().Add(limit)
	for {
		if _, err := d.client().machine.Status(t.Context(), &bangerv1.StatusRequest{}); err == nil {
			return d
		}
		if d.dead() || time.Now().After(deadline) {
			data, _ := os.ReadFile(log.Name())
			t.Fatalf("the daemon does not serve:\n%s", data)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (d *process) dead() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

func (d *process) waitDead(t *testing.T) {
	t.Helper()
	select {
	case <-d.done:
	case <-time.After(limit):
		t.Fatal("the daemon was to die and did not")
	}
	if status := d.cmd.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != syscall.SIGKILL {
		t.Fatalf("the daemon was to be killed: %v", d.cmd.ProcessState)
	}
}

// stop ends the daemon in the ordinary way.
func (d *process) stop(t *testing.T) {
	t.Helper()
	d.client().machine.Shutdown(d.ctx(t), &bangerv1.ShutdownRequest{})
	d.waitEnded(t)
}

func (d *process) waitEnded(t *testing.T) {
	t.Helper()
	select {
	case <-d.done:
	case <-time.After(limit):
		t.Fatal("the daemon does not end")
	}
}

func (d *process) ctx(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

func (d *process) forget(t *testing.T) {
	t.Helper()
	if err := os.Truncate(d.w.state+".points", 0); err != nil {
		t.Fatal(err)
	}
}

// points are the steps that were gone through since forget.
func (d *process) points(t *testing.T) []string {
	t.Helper()
	f, err := os.Open(d.w.state + ".points")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var points []string
	for s := bufio.NewScanner(f); s.Scan(); {
		points = append(points, s.Text())
	}
	return points
}

// waitPoint waits until the daemon has come to a step at which it pauses.
func (d *process) waitPoint(t *testing.T, point string) {
	t.Helper()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if slices.Contains(d.points(t), point) {
			return
		}
	}
	t.Fatalf("the daemon does not come to %s", point)
}

// resume lets a daemon that pauses go on.
func (d *process) resume(t *testing.T) {
	t.Helper()
	path := d.w.state + ".go"
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
}

type client struct {
	w          *world
	machine    bangerv1connect.MachineClient
	vms        bangerv1connect.VMsClient
	ops        bangerv1connect.OperationsClient
	workspaces bangerv1connect.WorkspacesClient
	images     bangerv1connect.ImagesClient
	kernels    bangerv1connect.KernelsClient

	accepted func() // unless nil, called when the daemon has taken a prepare on
}

func (d *process) client() *client {
	h := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(d.w.state, "bangerd.sock"))
		},
	}}
	return &client{
		w:          d.w,
		machine:    bangerv1connect.NewMachineClient(h, "http://banger"),
		vms:        bangerv1connect.NewVMsClient(h, "http://banger"),
		ops:        bangerv1connect.NewOperationsClient(h, "http://banger"),
		workspaces: bangerv1connect.NewWorkspacesClient(h, "http://banger"),
		images:     bangerv1connect.NewImagesClient(h, "http://banger"),
		kernels:    bangerv1connect.NewKernelsClient(h, "http://banger"),
	}
}

// exec runs one command in the VM "v" and waits for its end, or that of the guest.
func (d *process) exec(t *testing.T, argv ...string) {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(d.ctx(t), "unix", filepath.Join(d.w.state, "bangerd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	fmt.Fprint(conn, "POST /v1/exec?vm=v HTTP/1.1\r\nHost: banger\r\nConnection: Upgrade\r\nUpgrade: banger-stream/1\r\n\r\n")
	in := bufio.NewReader(conn)
	res, err := http.ReadResponse(in, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("exec: %v, %v", res, err)
	}
	s := wire.NewStream(conn)
	if err := s.SendJSON(wire.KindRequest, wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Argv: argv}}); err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, in)
}

// do waits for an operation that was just begun.
func (c *client) do(ctx context.Context) func(*bangerv1.Operation, error) error {
	return func(op *bangerv1.Operation, err error) error {
		if err != nil {
			return err
		}
		stream, err := c.ops.Watch(ctx, &bangerv1.WatchOperationRequest{Id: op.Id})
		if err != nil {
			return err
		}
		defer stream.Close()
		for stream.Receive() {
			switch m := stream.Msg(); m.State {
			case bangerv1.Operation_RUNNING:
			case bangerv1.Operation_DONE:
				return nil
			default:
				return fmt.Errorf("%s: %s", m.State, m.Error.GetMessage())
			}
		}
		return fmt.Errorf("the stream broke: %w", stream.Err())
	}
}

func (c *client) create(ctx context.Context, noStart bool) error {
	return c.do(ctx)(c.vms.Create(ctx, &bangerv1.CreateVMRequest{
		Name: "v", NoStart: noStart, Ready: bangerv1.Ready_READY_AGENT, Cpus: 1, Memory: 256 << 20, Disk: 64 << 20,
	}))
}

// vm is the VM "v", nil when there is none.
func (c *client) vm(ctx context.Context) (*bangerv1.VM, error) {
	res, err := c.vms.List(ctx, &bangerv1.ListVMsRequest{})
	if err != nil {
		return nil, err
	}
	for _, v := range res.Vms {
		if v.Name == "v" {
			return c.vms.Show(ctx, &bangerv1.ShowVMRequest{Ref: "v"})
		}
	}
	return nil, nil
}
