package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"banger/internal/daemon/driver"
	"banger/internal/daemon/hostcmd"
)

// VMMHost is a VMM and what it needs to be tried.
type VMMHost struct {
	// VMM need not have been probed.
	VMM driver.VMM
	// Prepare fills dir, which is empty, with what the spec that it returns names. The
	// guest must run until its process is killed.
	Prepare func(t *testing.T, dir string) driver.Spec
	// Start runs the command in dir, as the shim would, until kill is called. Nil is a
	// process of this test with the output thrown away.
	Start func(t *testing.T, dir string, c driver.Command) (kill func())
}

// VMM tests a driver.VMM.
func VMM(t *testing.T, h VMMHost) {
	if h.Start == nil {
		h.Start = startProcess
	}
	ability, err := h.VMM.Probe(within(t))
	if err != nil {
		t.Fatalf("Probe: %v", err)
	}
	t.Run("ability", func(t *testing.T) { testAbility(t, h, ability) })
	t.Run("command is pure", func(t *testing.T) { testCommand(t, h) })
	t.Run("specs that are refused", func(t *testing.T) { testRefusals(t, h) })
	t.Run("life", func(t *testing.T) { testLife(t, h) })
	t.Run("two of the same spec", func(t *testing.T) { testTwo(t, h) })
	t.Run("no process", func(t *testing.T) { testNoProcess(t, h) })
	t.Run("channel does no I/O", func(t *testing.T) { testChannelIsLazy(t, h) })
}

func testAbility(t *testing.T, h VMMHost, a driver.Ability) {
	if !slices.Contains([]string{"qemu", "firecracker", "fake"}, h.VMM.Name()) {
		t.Errorf("Name is %q", h.VMM.Name())
	}
	if a.Accelerator != "kvm" && a.Reason == "" {
		t.Errorf("the accelerator is %q, and nothing says why", a.Accelerator)
	}
	again, err := h.VMM.Probe(within(t))
	if err != nil || again != a {
		t.Errorf("a second Probe says %+v, %v; the first said %+v", again, err, a)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.VMM.Probe(ctx); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("Probe with a context that has ended: %v", err)
	}
}

// command makes the command for a VM in a new directory, and its jail.
func (h VMMHost) command(t *testing.T, dir string) (driver.Spec, driver.Command) {
	t.Helper()
	spec := h.Prepare(t, dir)
	c, err := h.VMM.Command(spec)
	if err != nil {
		t.Fatalf("Command: %v", err)
	}
	if err := h.VMM.Confine(within(t), dir, spec); err != nil {
		t.Fatalf("Confine: %v", err)
	}
	t.Cleanup(func() {
		for range 2 { // absent is success
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := h.VMM.Free(ctx, dir); err != nil {
				t.Errorf("Free: %v", err)
			}
		}
	})
	return spec, c
}

func testCommand(t *testing.T, h VMMHost) {
	dir := t.TempDir()
	spec := h.Prepare(t, dir)
	before := encode(t, spec)
	first, err := h.VMM.Command(spec)
	if err != nil {
		t.Fatal(err)
	}
	if len(first.Argv) == 0 || first.Argv[0] == "" {
		t.Fatalf("no program: %q", first.Argv)
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if again, err := h.VMM.Command(spec); err != nil || !bytes.Equal(encode(t, again), encode(t, first)) {
				t.Errorf("the same spec gives another command: %+v, %v", again, err)
			}
		})
	}
	all.Wait()
	if !bytes.Equal(encode(t, spec), before) {
		t.Errorf("Command changed the spec: %s, was %s", encode(t, spec), before)
	}
	for _, arg := range append(slices.Clone(first.Argv), first.Env...) {
		if strings.Contains(arg, dir) {
			t.Errorf("the VM's directory is named: %q", arg)
		}
	}
}

func encode(t *testing.T, v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		t.Error(err)
	}
	return data
}

func testRefusals(t *testing.T, h VMMHost) {
	for name, change := range map[string]func(*driver.Spec){
		"no cpu":           func(s *driver.Spec) { s.CPUs = 0 },
		"no memory":        func(s *driver.Spec) { s.Memory = 0 },
		"memory not whole": func(s *driver.Spec) { s.Memory++ },
		"absolute kernel":  func(s *driver.Spec) { s.Kernel = "/" + s.Kernel },
		"initrd outside":   func(s *driver.Spec) { s.Initrd = "../" + s.Initrd },
		"long serial":      func(s *driver.Spec) { s.Disks[0].Serial = strings.Repeat("x", 21) },
		"unknown format":   func(s *driver.Spec) { s.Disks[0].Format = "vmdk" },
		"multicast MAC":    func(s *driver.Spec) { s.NIC = &driver.NIC{MAC: "01:00:5e:00:00:01", Socket: "run/net.sock"} },
		"absolute socket":  func(s *driver.Spec) { s.NIC = &driver.NIC{MAC: "02:ba:6e:00:00:02", Socket: "/net.sock"} },
	} {
		spec := h.Prepare(t, t.TempDir())
		spec.Disks = slices.Clone(spec.Disks)
		if len(spec.Disks) == 0 {
			t.Fatal("Prepare gives no disk")
		}
		change(&spec)
		if c, err := h.VMM.Command(spec); err == nil {
			t.Errorf("%s: taken: %q", name, c.Argv)
		}
	}
}

// A guest is booted in a directory whose path does not fit into a socket address.
func testLife(t *testing.T, h VMMHost) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	spec, c := h.command(t, dir)
	// Boot may be called before the process has made anything.
	booted := make(chan error, 1)
	go func() { booted <- h.VMM.Boot(within(t), dir, spec) }()
	kill := h.Start(t, dir, c)
	if err := <-booted; err != nil {
		t.Fatalf("Boot: %v", err)
	}
	if err := h.VMM.PowerButton(within(t), dir); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("PowerButton: %v", err)
	}
	kill()
	short, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := h.VMM.PowerButton(short, dir); err == nil {
		t.Error("the power button of a dead VM works")
	}
}

// Copies of one spec run side by side: everything in it is relative.
func testTwo(t *testing.T, h VMMHost) {
	dirs := []string{t.TempDir(), t.TempDir()}
	spec, first := h.command(t, dirs[0])
	_, second := h.command(t, dirs[1])
	if !bytes.Equal(encode(t, first), encode(t, second)) {
		t.Errorf("the command depends on the directory: %q, %q", first.Argv, second.Argv)
	}
	for _, dir := range dirs {
		kill := h.Start(t, dir, first)
		defer kill()
	}
	for _, dir := range dirs {
		if err := h.VMM.Boot(within(t), dir, spec); err != nil {
			t.Errorf("Boot: %v", err)
		}
	}
}

func testNoProcess(t *testing.T, h VMMHost) {
	dir := t.TempDir()
	spec := h.Prepare(t, dir)
	why := errors.New("the process ended")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer time.AfterFunc(50*time.Millisecond, func() { cancel(why) }).Stop()
	if err := h.VMM.Boot(ctx, dir, spec); !errors.Is(err, why) && !errors.Is(err, context.Canceled) {
		t.Errorf("Boot without a process: %v", err)
	}
}

func testChannelIsLazy(t *testing.T, h VMMHost) {
	ch := h.VMM.Channel(filepath.Join(t.TempDir(), "absent"), make([]byte, 16))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if conn, err := ch.Dial(ctx); err == nil {
		conn.Close()
		t.Error("Dial reaches a guest that is not there")
	}
	if err := ch.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// startProcess runs c until kill, or the test's end.
func startProcess(t *testing.T, dir string, c driver.Command) (kill func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	var output lockedBuffer
	go func() {
		_, err := hostcmd.Run(ctx, hostcmd.Command{Argv: c.Argv, Env: c.Env, Dir: dir, Stdout: &output, Stderr: &output})
		ended <- err
	}()
	kill = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil && t.Failed() {
			t.Logf("the process in %s: %v\n%s", dir, err, output.String())
		}
	})
	t.Cleanup(kill)
	return kill
}

// lockedBuffer is a buffer for two writers.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
