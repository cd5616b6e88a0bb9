package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/config"
	"banger/internal/daemon/driver/fake"
	"banger/internal/daemon/image/imagetest"
	"banger/internal/daemon/locks"
	"banger/internal/daemon/opstate"
	"banger/internal/daemon/vm"
)

// TestMethods pins the one list of methods to the contract.
func TestMethods(t *testing.T) {
	var want []string
	services := bangerv1.File_banger_v1_banger_proto.Services()
	for i := range services.Len() {
		s := services.Get(i)
		for j := range s.Methods().Len() {
			want = append(want, fmt.Sprintf("/%s/%s", s.FullName(), s.Methods().Get(j).Name()))
		}
	}
	if got := methods(); !slices.Equal(got, want) {
		t.Errorf("methods:\n%s\nthe contract:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// open opens a daemon on the fake host in a state directory whose path is longer than
// a socket's may be.
func open(t *testing.T, opts ...Option) (*Daemon, config.Layout) {
	t.Helper()
	layout := config.Layout{Root: filepath.Join(t.TempDir(), strings.Repeat("long/", 25), "state")}
	return openAt(t, layout, opts...), layout
}

func openAt(t *testing.T, layout config.Layout, opts ...Option) *Daemon {
	t.Helper()
	t.Setenv("BANGER_CONFIG", "")
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	d, err := Open(t.Context(), append(testOptions(t, layout), opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if _, err := os.Lstat(layout.Socket()); err == nil {
			t.Error("the socket is still there after Close")
		}
	})
	return d
}

func testOptions(t *testing.T, layout config.Layout) []Option {
	programs := fstest.MapFS{
		"banger-shim":  {Data: []byte("no program")},
		"banger-guest": {Data: []byte("no program")},
		"banger-net":   {Data: []byte("no program")},
	}
	return []Option{
		WithLayout(layout), WithPrograms(programs), WithHost(fakeHost(t).Drivers()),
		WithImageBuilder(&imagetest.Builder{}), WithChecker(locks.NewChecker()), WithBuild(Build{Version: "test", ID: "1-1"}),
	}
}

// fakeHost has a VMM that is there and is never started.
func fakeHost(t *testing.T) *fake.Host {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return fake.New(t.TempDir(), self)
}

func httpClient(layout config.Layout) *http.Client {
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			dir, err := os.Open(layout.Root)
			if err != nil {
				return nil, err
			}
			defer dir.Close()
			return new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/bangerd.sock", dir.Fd()))
		},
	}}
}

func post(t *testing.T, c *http.Client, path, body string) (int, string) {
	t.Helper()
	res, err := c.Post("http://banger"+path, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(data)
}

// TestPlainHTTP: what a person with curl gets.
func TestPlainHTTP(t *testing.T) {
	_, layout := open(t)
	c := httpClient(layout)
	if info, err := os.Stat(layout.Socket()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", info, err)
	}
	code, body := post(t, c, bangerv1connect.VMsListProcedure, "{}")
	if code != http.StatusOK || body != "{}" {
		t.Errorf("list: %d %s", code, body)
	}
	code, body = post(t, c, bangerv1connect.VMsShowProcedure, `{"ref":"nobody"}`)
	if code != http.StatusNotFound || !strings.Contains(body, "no VM named nobody") {
		t.Errorf("show: %d %s", code, body)
	}
	for _, path := range []string{"/banger.v1.VMs/Explode", "/", "/dashboard"} {
		code, body := post(t, c, path, "{}")
		var e struct{ Code string }
		if err := json.Unmarshal([]byte(body), &e); err != nil || code != http.StatusNotFound || e.Code != string(api.UnknownMethod) {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	if code, body := post(t, c, "/v1/exec?vm=nobody", ""); code != http.StatusUpgradeRequired || !strings.Contains(body, "banger-stream/1") {
		t.Errorf("exec without an upgrade: %d %s", code, body)
	}
}

// TestErrorDetail: code, message and hint reach a client of the contract.
func TestErrorDetail(t *testing.T) {
	_, layout := open(t)
	vms := bangerv1connect.NewVMsClient(httpClient(layout), "http://banger")
	for _, c := range []struct {
		req  *bangerv1.CreateVMRequest
		code api.Code
	}{
		{&bangerv1.CreateVMRequest{Name: "Not A Label"}, api.Invalid},
		{&bangerv1.CreateVMRequest{Name: "a", Cpus: 10000}, api.Invalid},
		{&bangerv1.CreateVMRequest{Name: "a", Cpus: -1}, api.Invalid},
		{&bangerv1.CreateVMRequest{Name: "a", Memory: 1 << 20}, api.Invalid},
		{&bangerv1.CreateVMRequest{Name: "a", Memory: 1 << 60}, api.Invalid},
		{&bangerv1.CreateVMRequest{Name: "a", Disk: 1}, api.Invalid},
		{&bangerv1.CreateVMRequest{Name: "a", Disk: 1 << 60}, api.Invalid},
	} {
		_, err := vms.Create(t.Context(), c.req)
		d := detail(t, err)
		if api.Code(d.GetCode()) != c.code || d.GetMessage() == "" || d.GetHint() == "" {
			t.Errorf("%v: %v", c.req, d)
		}
	}
}

func detail(t *testing.T, err error) *bangerv1.ErrorDetail {
	t.Helper()
	var ce *connect.Error
	if !errors.As(err, &ce) || len(ce.Details()) != 1 {
		t.Fatalf("no error with a detail: %v", err)
	}
	v, err := ce.Details()[0].Value()
	if err != nil {
		t.Fatal(err)
	}
	return v.(*bangerv1.ErrorDetail)
}

// TestSecondDaemon: one state directory has one daemon; what is no socket is left
// alone; a stale socket is replaced.
func TestSecondDaemon(t *testing.T) {
	_, layout := open(t)
	_, err := Open(t.Context(), testOptions(t, layout)...)
	if api.CodeOf(err) != api.Busy || !strings.Contains(err.Error(), fmt.Sprintf("pid %d", os.Getpid())) {
		t.Errorf("a second daemon: %v", err)
	}

	other := config.Layout{Root: filepath.Join(t.TempDir(), "state")}
	if err := other.Prepare(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(other.Socket(), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), testOptions(t, other)...); api.CodeOf(err) != api.Refused {
		t.Errorf("a file in the way: %v", err)
	}
	if data, err := os.ReadFile(other.Socket()); err != nil || string(data) != "mine" {
		t.Errorf("the file in the way is gone: %v", err)
	}
	os.Remove(other.Socket())
	stale, err := net.Listen("unix", other.Socket())
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	stale.Close()
	openAt(t, other)
	if code, _ := post(t, httpClient(other), bangerv1connect.MachineStatusProcedure, "{}"); code != http.StatusOK {
		t.Errorf("over a stale socket: %d", code)
	}
}

// TestOpenUndoes: what Open began is undone when it fails, so that it can be tried
// again.
func TestOpenUndoes(t *testing.T) {
	layout := config.Layout{Root: filepath.Join(t.TempDir(), "state")}
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	broken := fakeHost(t)
	broken.Unable = errors.New("no VMM here")
	_, err := Open(t.Context(), append(testOptions(t, layout), WithHost(broken.Drivers()))...)
	if err == nil || !strings.Contains(err.Error(), "no VMM here") {
		t.Fatalf("open: %v", err)
	}
	_, err = Open(t.Context(), append(testOptions(t, layout), WithPrograms(fstest.MapFS{}))...)
	if api.CodeOf(err) != api.NotReady || api.HintOf(err) == "" {
		t.Fatalf("without programs: %v", err)
	}
	openAt(t, layout)
}

// TestOneRelease: the programs of an earlier release go, ours stay.
func TestOneRelease(t *testing.T) {
	layout := config.Layout{Root: filepath.Join(t.TempDir(), "state")}
	if err := os.MkdirAll(filepath.Join(layout.Program("earlier"), "banger-shim"), 0o700); err != nil {
		t.Fatal(err)
	}
	openAt(t, layout)
	left, err := filepath.Glob(filepath.Join(layout.Programs(), "*", "banger-shim"))
	if err != nil || len(left) != 1 || strings.Contains(left[0], "earlier") {
		t.Errorf("there are %v, %v", left, err)
	}
}

// TestShutdown: an idle daemon ends when it is asked, a busy one only by force.
func TestShutdown(t *testing.T) {
	stall := make(chan struct{})
	builder := &imagetest.Builder{Before: stallBuild(stall)}
	d, layout := open(t, WithImageBuilder(builder))
	c := httpClient(layout)
	if code, body := post(t, c, bangerv1connect.ImagesPullProcedure, `{"name":"debian-bookworm"}`); code != http.StatusOK {
		t.Fatalf("pull: %s", body)
	}
	code, body := post(t, c, bangerv1connect.MachineShutdownProcedure, `{"ifIdle":true}`)
	if code == http.StatusOK || !strings.Contains(body, "operations, streams and reboots under way: 1") {
		t.Errorf("a busy daemon was asked: %d %s", code, body)
	}
	close(stall)
	deadline := time.Now().Add(time.Minute)
	for n, err := d.busy(); n > 0 && err == nil && time.Now().Before(deadline); n, err = d.busy() {
		time.Sleep(time.Millisecond)
	}
	if code, body := post(t, c, bangerv1connect.MachineShutdownProcedure, `{"ifIdle":true}`); code != http.StatusOK {
		t.Errorf("an idle daemon was asked: %d %s", code, body)
	}
	select {
	case <-d.stopping:
	default:
		t.Error("it does not stop")
	}
}

// TestNothingBeginsAfterTheEnd: an idle daemon that was asked to end refuses what comes
// in the meantime, and says that the next one can be asked.
func TestNothingBeginsAfterTheEnd(t *testing.T) {
	d, layout := open(t)
	c := httpClient(layout)
	if n := d.end(true); n != 0 {
		t.Fatalf("busy with %d", n)
	}
	for _, call := range []struct{ path, body string }{
		{bangerv1connect.ImagesPullProcedure, `{"name":"debian-bookworm"}`},
		{bangerv1connect.MachineStatusProcedure, `{}`},
	} {
		code, body := post(t, c, call.path, call.body)
		if code != http.StatusServiceUnavailable || !strings.Contains(body, "the daemon is shutting down") {
			t.Errorf("%s: %d %s", call.path, code, body)
		}
	}
	if _, err := d.attach(); api.CodeOf(err) != api.Stopping {
		t.Errorf("a stream: %v", err)
	}
	if ops := d.ops.List(); len(ops) != 0 {
		t.Errorf("%d operations began", len(ops))
	}
}

// TestEndOrWork: of an idle daemon's end and a piece of work that come at the same time
// one wins, and the other is told.
func TestEndOrWork(t *testing.T) {
	const workers = 8
	for range 500 {
		d := &Daemon{ops: opstate.NewRegistry[proto.Message](t.Context(), 1, time.Hour), vms: new(vm.Manager), log: slog.New(slog.DiscardHandler)}
		release, start := make(chan struct{}), make(chan struct{})
		refused := make(chan error, workers)
		for i := range workers {
			go func() {
				<-start
				var err error
				if i%2 == 0 {
					_, err = d.begin("pull", "x", func(context.Context, *operation) (proto.Message, error) { <-release; return nil, nil })
				} else {
					_, err = d.attach()
				}
				refused <- err
			}()
		}
		close(start)
		runtime.Gosched()
		busy, began := d.end(true), 0
		for range workers {
			if <-refused == nil {
				began++
			}
		}
		close(release)
		if began > 0 != (busy > 0) {
			t.Fatalf("busy with %d when it was to end, and then %d began", busy, began)
		}
	}
}

// TestNothingBeginsAfterClose: a daemon that was told by a signal refuses in the same way.
func TestNothingBeginsAfterClose(t *testing.T) {
	var d *Daemon
	t.Cleanup(func() { // after that of open, which closes it
		if _, err := d.attach(); api.CodeOf(err) != api.Stopping {
			t.Errorf("a stream: %v", err)
		}
	})
	d, _ = open(t)
}
