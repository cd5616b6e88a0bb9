package qemuproc

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"banger/internal/config"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/driver/conformance"
	"banger/internal/guest/wire"
	"banger/test/need"
)

const hello = "tiny kernel here\r\n"

// tinyKernel is an ELF file that QEMU takes for a kernel: it is entered by PVH (see
// https://xenbits.xen.org/docs/unstable/misc/pvh.html) in 32 bit mode, writes hello to
// the serial port, and stops the CPU, or resets the machine by a triple fault.
func tinyKernel(reset bool) []byte {
	const (
		base = 0x100000 // where it is loaded: address = base + offset in the file
		note = 0x100
		code = 0x200
		data = 0x300
	)
	file := make([]byte, 8192)
	b := &bytes.Buffer{}
	le := binary.LittleEndian
	put := func(v ...any) {
		for _, v := range v {
			_ = binary.Write(b, le, v) // a bytes.Buffer takes all
		}
	}
	b.WriteString("\x7fELF\x02\x01\x01")
	b.Write(make([]byte, 9))
	put(uint16(2), uint16(62), uint32(1), uint64(base+code), uint64(64), uint64(0), uint32(0))
	put(uint16(64), uint16(56), uint16(2), uint16(0), uint16(0), uint16(0))
	put(uint32(1), uint32(7), uint64(0), uint64(base), uint64(base), uint64(len(file)), uint64(len(file)), uint64(4096)) // PT_LOAD
	put(uint32(4), uint32(4), uint64(note), uint64(base+note), uint64(base+note), uint64(24), uint64(24), uint64(4))     // PT_NOTE
	copy(file, b.Bytes())

	b.Reset()
	put(uint32(4), uint32(8), uint32(18)) // XEN_ELFNOTE_PHYS32_ENTRY
	b.WriteString("Xen\x00")
	put(uint64(base + code))
	copy(file[note:], b.Bytes())

	b.Reset()
	b.WriteString("\xbe") // mov esi, data
	put(uint32(base + data))
	b.WriteString("\x66\xba\xf8\x03")             // mov dx, 0x3f8
	b.WriteString("\xac\x84\xc0\x74\x03\xee\xeb") // lodsb; test al, al; jz +3; out dx, al
	b.WriteString("\xf8")                         // jmp to lodsb
	if reset {
		b.WriteString("\x0f\x01\x1d") // lidt of zeros
		put(uint32(base + data + 0x80))
		b.WriteString("\xcc") // int3
	} else {
		b.WriteString("\xfa\xf4\xeb\xfd") // cli; hlt; jmp to hlt
	}
	copy(file[code:], b.Bytes())
	copy(file[data:], hello+"\x00")
	return file
}

// machine makes a VM's directory with the tiny kernel and two disks.
func machine(t testing.TB, dir string, reset bool) driver.Spec {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"run/kernel": tinyKernel(reset), "run/initrd": []byte("none"),
		"disk": make([]byte, 1<<20), "run/modules": make([]byte, 4096),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	spec := exampleSpec()
	spec.CPUs, spec.Memory = 1, minMemory
	return spec
}

type process struct {
	cmd    *exec.Cmd
	exited chan struct{}
	dir    string
}

// start runs QEMU in dir until the test ends.
func start(t testing.TB, v *VMM, dir string, spec driver.Spec) *process {
	t.Helper()
	c, err := v.Command(spec)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: exec.Command(c.Argv[0], c.Argv[1:]...), exited: make(chan struct{}), dir: dir}
	p.cmd.Dir, p.cmd.Env = dir, c.Env
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := os.Create(filepath.Join(dir, "console"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	p.cmd.Stdout, p.cmd.Stderr = out, out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.kill(t)
		if t.Failed() {
			t.Logf("QEMU (%v) said: %s", p.cmd.ProcessState, p.console(t))
		}
	})
	return p
}

func (p *process) kill(t testing.TB) {
	_ = p.cmd.Process.Kill()
	<-p.exited
}

func (p *process) console(t testing.TB) string {
	data, err := os.ReadFile(filepath.Join(p.dir, "console"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !cond(); {
		if time.Now().After(deadline) {
			t.Fatalf("did not happen in time: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// probed is the driver after Probe, without KVM: the tests are the same everywhere.
func probed(t testing.TB) *VMM {
	t.Helper()
	need.Need(t, "qemu")
	v := New(config.KVMOff)
	a, err := v.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if a.Accelerator != "tcg" || a.Reason == "" {
		t.Errorf("ability %+v", a)
	}
	return v
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestConformance(t *testing.T) {
	v := probed(t)
	conformance.VMM(t, conformance.VMMHost{
		VMM:     v,
		Prepare: func(t *testing.T, dir string) driver.Spec { return machine(t, dir, false) },
	})
}

// The whole command line, in a real QEMU: sandboxed, the guest's console on standard
// output, QMP and the agent's port there.
func TestRealGuest(t *testing.T) {
	v, dir := probed(t), t.TempDir()
	p := start(t, v, dir, machine(t, dir, false))
	if err := v.Boot(within(t), dir, exampleSpec()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the guest's greeting", func() bool { return strings.Contains(p.console(t), hello) })
	if got := p.console(t); got != hello {
		t.Errorf("the console has more than the guest's words: %q", got)
	}
	if v.probed.Sandbox {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(status), "\nSeccomp:\t2\n") {
			t.Error("QEMU has no seccomp filter")
		}
	}
	for _, name := range []string{QMPSocket, AgentSocket} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Type() != fs.ModeSocket {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := v.PowerButton(within(t), dir); err != nil {
		t.Errorf("power button: %v", err)
	}
}

// The network's process may come late, go, and come again: QEMU takes it each time, and
// runs on. query-rx-filter shows the card's address as the guest sees it.
func TestRealNIC(t *testing.T) {
	v, dir := probed(t), t.TempDir()
	p := start(t, v, dir, machine(t, dir, false))
	if err := v.Boot(within(t), dir, exampleSpec()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		var conn net.Conn
		// QEMU's queue holds one: until it has taken the last, the next gets EAGAIN.
		eventually(t, "a connection to the card", func() (ok bool) {
			var err error
			conn, err = wire.DialUnix(within(t), dir, exampleSpec().NIC.Socket)
			return err == nil
		})
		// No frame: this guest has no driver for the card, and QEMU does not look at its
		// socket, the end of it included, until the guest has taken what came.
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
	var filters []struct {
		MAC string `json:"main-mac"`
	}
	err := converse(within(t), qmpOf(dir), func(ctx context.Context, q *qmp) error {
		return q.call(ctx, "query-rx-filter", &filters)
	})
	if err != nil || len(filters) != 1 || filters[0].MAC != exampleSpec().NIC.MAC {
		t.Errorf("the card is %+v, %v", filters, err)
	}
	select {
	case <-p.exited:
		t.Error("QEMU has ended")
	default:
	}
}

// A guest that resets ends its QEMU with 0.
func TestRealReset(t *testing.T) {
	v, dir := probed(t), t.TempDir()
	p := start(t, v, dir, machine(t, dir, true))
	select {
	case <-p.exited:
	case <-within(t).Done():
		t.Fatal("QEMU goes on after a reset")
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 || p.console(t) != hello {
		t.Errorf("exit code %d, console %q", code, p.console(t))
	}
}

// One disk never serves two QEMUs; one that both only read does.
func TestRealDiskLock(t *testing.T) {
	v, first, second := probed(t), t.TempDir(), t.TempDir()
	start(t, v, first, machine(t, first, false))
	if err := v.Boot(within(t), first, exampleSpec()); err != nil {
		t.Fatal(err)
	}
	share := func(name string) {
		t.Helper()
		if err := os.Remove(filepath.Join(second, name)); err != nil {
			t.Fatal(err)
		}
		if err := os.Link(filepath.Join(first, name), filepath.Join(second, name)); err != nil {
			t.Fatal(err)
		}
	}
	spec := machine(t, second, false)
	share("run/modules")
	p := start(t, v, second, spec)
	if err := v.Boot(within(t), second, exampleSpec()); err != nil {
		t.Fatalf("with the read-only disk of another: %v", err)
	}
	p.kill(t)

	share("disk")
	p = start(t, v, second, spec)
	select {
	case <-p.exited:
	case <-within(t).Done():
		t.Fatal("two QEMUs run on one disk")
	}
	if p.cmd.ProcessState.ExitCode() == 0 || !strings.Contains(p.console(t), "lock") {
		t.Errorf("the second QEMU: %v, %q", p.cmd.ProcessState, p.console(t))
	}
}

func TestProgramThatIsMissing(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	t.Setenv(ProgramEnv, "banger-no-such-program")
	if _, err := New(config.KVMOff).Probe(t.Context()); !errors.Is(err, exec.ErrNotFound) || !strings.Contains(err.Error(), ProgramEnv) {
		t.Errorf("error %v", err)
	}
	// A program that is no QEMU is not taken for one.
	t.Setenv(ProgramEnv, "/bin/echo")
	if _, err := New(config.KVMOff).Probe(t.Context()); err == nil || !strings.Contains(err.Error(), "no QEMU") {
		t.Errorf("error %v", err)
	}
}

// A QEMU that lacks seccomp is used, and said to lack it.
func TestProbeWithoutSeccomp(t *testing.T) {
	need.Need(t, "qemu")
	fake := filepath.Join(t.TempDir(), "qemu")
	script := "#!/bin/sh\ncase \"$1\" in\n-sandbox) exit 1;;\n-version) echo 'QEMU emulator version 9.1.0';;\n" +
		"*) echo 'microvm   microvm (i386)';;\nesac\n"
	if err := os.WriteFile(fake, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv(ProgramEnv, fake)
	v := New(config.KVMOff)
	a, err := v.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(a.Reason, "seccomp") || !strings.Contains(a.Reason, "configuration") {
		t.Errorf("ability %+v", a)
	}
	c, err := v.Command(exampleSpec())
	if err != nil {
		t.Fatal(err)
	}
	if c.Argv[0] != fake || strings.Contains(text(c.Argv), "-sandbox") {
		t.Errorf("argv %v", c.Argv)
	}
}

func TestBootEndsWithContext(t *testing.T) {
	dir := t.TempDir() // there is no run/: QEMU has not even begun
	why := errors.New("the process ended")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(20*time.Millisecond, func() { cancel(why) })
	if err := New(config.KVMOff).Boot(ctx, dir, exampleSpec()); !errors.Is(err, why) {
		t.Errorf("error %v", err)
	}
}

// serialPort is a guest's end of QEMU's serial port: one host after the other, and
// the guest is told nothing of it.
type serialPort struct {
	net.Listener

	mu   sync.Mutex
	conn net.Conn
}

func (p *serialPort) host() net.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conn
}

func (p *serialPort) Read(b []byte) (int, error) {
	for {
		conn := p.host()
		if conn == nil {
			var err error
			if conn, err = p.Accept(); err != nil {
				return 0, err
			}
			p.mu.Lock()
			p.conn = conn
			p.mu.Unlock()
		}
		n, err := conn.Read(b)
		if err == nil {
			return n, nil
		}
		conn.Close()
		p.mu.Lock()
		p.conn = nil
		p.mu.Unlock()
	}
}

// Write drops what no host is there to take.
func (p *serialPort) Write(b []byte) (int, error) {
	if conn := p.host(); conn != nil {
		_, _ = conn.Write(b)
	}
	return len(b), nil
}

func (p *serialPort) Close() error {
	err := p.Listener.Close()
	if conn := p.host(); conn != nil {
		conn.Close()
	}
	return err
}

// agentOn answers at the other end of the serial port like a guest's agent: it says
// hello and runs cat.
func agentOn(t *testing.T, dir string, magic []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, AgentSocket))
	if err != nil {
		t.Fatal(err)
	}
	port, ended := &serialPort{Listener: l}, make(chan struct{})
	go func() {
		defer close(ended)
		_ = wire.ServeGuest(port, magic, answer)
	}()
	t.Cleanup(func() {
		port.Close()
		<-ended
	})
}

func answer(conn net.Conn) {
	s := wire.NewStream(conn)
	defer s.Close()
	for {
		kind, payload, err := s.Recv()
		if err != nil {
			return
		}
		switch kind {
		case wire.KindRequest:
			var req wire.Request
			if json.Unmarshal(payload, &req) == nil && req.Op == wire.OpHello {
				_ = s.SendJSON(wire.KindReply, wire.Hello{ID: "0f9a", Nonce: req.Nonce})
				return
			}
		case wire.KindStdin:
			_ = s.Send(wire.KindStdout, payload)
			_ = s.Send(wire.KindStdinAck, binary.BigEndian.AppendUint32(nil, uint32(len(payload))))
		case wire.KindStdinEOF:
			_ = s.SendJSON(wire.KindExit, wire.Exit{})
			return
		}
	}
}

func TestChannelConforms(t *testing.T) {
	dir, own := t.TempDir(), bytes.Repeat([]byte("m"), wire.MagicLen)
	agentOn(t, dir, own)
	conformance.Channel(t, conformance.GuestHost{ID: "0f9a", Exec: true, Open: func(magic []byte) driver.Channel {
		if magic == nil {
			magic = own
		}
		return New(config.KVMOff).Channel(dir, magic)
	}})
}
