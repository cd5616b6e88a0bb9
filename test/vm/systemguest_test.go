package vm

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"banger/internal/daemon/driver"
	"banger/internal/daemon/driver/conformance"
	"banger/internal/daemon/fcproc"
	"banger/internal/guest/wire"
)

// TestSystemGuest is the guest's half of Firecracker: the channel over vsock, and that
// its ends mean what they say.
func TestSystemGuest(t *testing.T) {
	h := newSystem(t)
	h.ok("create", "--name", "dev", "--memory", "512M", "--cpus", "1", "--disk", "2G")
	id := h.show("dev").ID
	dir := filepath.Join(h.dir, "vms", id)
	v := fcproc.New()

	t.Run("channel", func(t *testing.T) {
		conformance.Channel(t, conformance.GuestHost{ID: id, Exec: true, NoMagic: true, Open: func(magic []byte) driver.Channel {
			return v.Channel(dir, magic)
		}})
	})
	t.Run("slow host", func(t *testing.T) { testSlowHost(t, v.Channel(dir, nil)) })
	t.Run("only the host", func(t *testing.T) { testOnlyTheHost(t, h) })

	// The host presses the keys that are all that Firecracker has for a power button.
	press := func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := v.PowerButton(ctx, dir); err != nil {
			t.Fatal(err)
		}
	}
	// A systemd that has only just started cannot be asked yet. The end of the guest breaks
	// off the exec.
	in := func(command string) func(*testing.T) {
		return func(*testing.T) {
			h.try("exec", "dev", "sh", "-c", "for n in $(seq 200); do "+command+" && break; sleep 0.2; done")
		}
	}
	for _, init := range []string{"systemd", "none"} {
		h.ok("start", "dev")
		if init == "none" {
			h.ok("exec", "dev", "sh", "-c", "ln -sf /bin/true /usr/sbin/init && sync")
			h.ok("stop", "dev")
			h.ok("start", "dev")
		}
		reboot := map[string]string{"systemd": "systemctl reboot", "none": "kill -TERM 1"}[init]
		poweroff := map[string]string{"systemd": "systemctl poweroff", "none": "kill -USR2 1"}[init]
		t.Run(init+" reboot", func(t *testing.T) { h.rebootsBy(t, "dev", in(reboot)) })
		t.Run(init+" poweroff", func(t *testing.T) { h.endsBy(t, "dev", in(poweroff)) })
		t.Run(init+" keys", func(t *testing.T) { h.endsBy(t, "dev", press) })
	}
}

// endsBy wants the guest to power off by what act does.
func (h *host) endsBy(t *testing.T, name string, act func(*testing.T)) {
	t.Helper()
	h.ok("start", name)
	act(t)
	waitFor(t, bootTimeout, "the VM to be stopped", func() bool { return h.show(name).State == "STOPPED" })
	if v := h.show(name); v.Ended != "the guest powered off" {
		t.Errorf("it has ended like this: %q", v.Ended)
	}
}

// rebootsBy wants the guest to reboot by what act does.
func (h *host) rebootsBy(t *testing.T, name string, act func(*testing.T)) {
	t.Helper()
	before := h.show(name).Handles["guest boot id"]
	act(t)
	waitFor(t, bootTimeout, "another boot", func() bool {
		v := h.show(name)
		return v.State == "RUNNING" && v.Handles["guest boot id"] != "" && v.Handles["guest boot id"] != before
	})
}

// testSlowHost reads what commands have written only when Firecracker would have forgotten
// it: the next connection that comes 2 s after the guest has closed one ends that
// (CONN_SHUTDOWN_TIMEOUT_MS and sweep_killq in its source). The sizes are around what fits
// between the two.
func testSlowHost(t *testing.T, ch driver.Channel) {
	defer ch.Close()
	const sizes, step = 12, 24 << 10
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	conns := make([]net.Conn, sizes)
	for k := range conns {
		var err error
		if conns[k], err = ch.Dial(ctx); err != nil {
			t.Fatal(err)
		}
		wire.NewStream(conns[k]).SendJSON(wire.KindRequest, wire.Request{Op: wire.OpExec, Exec: &wire.Exec{
			Argv: []string{"head", "-c", fmt.Sprint((k + 1) * step), "/dev/zero"},
		}})
	}
	waitFor(t, time.Minute, "the end of the commands", func() bool {
		exit, err := runIn(ctx, ch, "pgrep", "-x", "head")
		return err == nil && exit.Code == 1
	})
	time.Sleep(4 * time.Second) // what the test is about, not what it waits for
	if _, err := runIn(ctx, ch, "true"); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for k, conn := range conns {
		all.Go(func() {
			s := wire.NewStream(conn)
			defer s.Close()
			for got := 0; ; {
				kind, payload, err := s.Recv()
				switch {
				case err != nil:
					t.Errorf("of %d bytes %d have come: %v", (k+1)*step, got, err)
					return
				case kind == wire.KindStdout:
					got += len(payload)
				case kind == wire.KindExit:
					if got != (k+1)*step {
						t.Errorf("of %d bytes %d have come", (k+1)*step, got)
					}
					return
				}
			}
		})
	}
	all.Wait()
}

// runIn runs a command over a connection of its own.
func runIn(ctx context.Context, ch driver.Channel, argv ...string) (wire.Exit, error) {
	conn, err := ch.Dial(ctx)
	if err != nil {
		return wire.Exit{}, err
	}
	return wire.Run(ctx, conn, wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Argv: argv}}, wire.Stdio{})
}

// testOnlyTheHost knocks at the agent's port from inside.
func testOnlyTheHost(t *testing.T, h *host) {
	const knock = `use Socket; use Fcntl;
socket(my $s, 40, SOCK_STREAM, 0) or die "socket: $!";
connect($s, pack("SSLLx4", 40, 0, %d, 1)) or die "connect: $!";
syswrite($s, "\x01\x00\x00\x00\x0e" . '{"op":"hello"}');
my $n = sysread($s, my $b, 100);
print defined $n ? "read $n" : "read: $!";`
	h.ok("exec", "--user", "root", "dev", "modprobe", "vsock_loopback")
	out := h.ok("exec", "dev", "perl", "-e", fmt.Sprintf(knock, wire.VsockPort))
	if !strings.HasPrefix(out, "read 0") && !strings.Contains(out, "reset") {
		t.Errorf("a process of the guest hears from the agent: %q", out)
	}
}
