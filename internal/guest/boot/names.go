package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

// hostsMark ends the lines of /etc/hosts that are banger's.
const hostsMark = "# banger"

// setNames gives the guest its host name and its machine id. systemd sets the host
// name again, from /etc/hostname.
func (g *guest) setNames() error {
	id := g.cfg.Identity
	err := unix.Sethostname([]byte(id.Hostname))
	if err != nil {
		err = fmt.Errorf("cannot set the host name: %w", err)
	}
	return errors.Join(err, writeNames("/", id.Hostname, id.MachineID, gatewayLine(g.cfg.Network)))
}

// gatewayLine is the line of /etc/hosts that names the gateway, or nothing.
func gatewayLine(n *wire.Network) string {
	if n == nil || n.HostName == "" {
		return ""
	}
	return n.Gateway + " " + n.HostName
}

// writeNames writes the files of setNames below root. more is a line for hosts.
func writeNames(root, hostname, machineID, more string) error {
	etc := filepath.Join(root, "etc")
	hosts, _, err := readOptional(filepath.Join(etc, "hosts"))
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name, content string
		perm          os.FileMode
	}{
		{"hostname", hostname + "\n", 0o644},
		{"hosts", hostsFile(hosts, hostname, more), 0o644},
		{"machine-id", machineID + "\n", 0o444},
	} {
		if err := replaceFile(filepath.Join(etc, f.name), f.content, f.perm); err != nil {
			return fmt.Errorf("cannot write /etc/%s: %w", f.name, err)
		}
	}
	return nil
}

// hostsFile is the content of /etc/hosts with the guest's own name and the line more
// in it. Lines that are not banger's stay as they are.
func hostsFile(content, hostname, more string) string {
	var out strings.Builder
	local := false
	for line := range strings.Lines(content) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasSuffix(line, hostsMark) {
			continue
		}
		fields := strings.Fields(line)
		if len(fields) > 1 && fields[0] == "127.0.0.1" {
			for _, name := range fields[1:] {
				local = local || name == "localhost"
			}
		}
		out.WriteString(line + "\n")
	}
	if !local {
		out.WriteString("127.0.0.1 localhost " + hostsMark + "\n")
		out.WriteString("::1 localhost ip6-localhost ip6-loopback " + hostsMark + "\n")
	}
	out.WriteString("127.0.1.1 " + hostname + " " + hostsMark + "\n")
	if more != "" {
		out.WriteString(more + " " + hostsMark + "\n")
	}
	return out.String()
}

const (
	clockBehind = time.Second
	clockAhead  = time.Minute
)

// correctClock says what the wall clock should show, and whether now is so far off
// that it is set. host is the host's time at the start of the boot, up how long
// the kernel has run since. A real-time clock that works is never behind that, and
// ahead by as long as the host took to start the VMM: on a loaded host seconds,
// and then the clock is the one to trust.
func correctClock(now, host time.Time, up time.Duration) (time.Time, bool) {
	want := host.Add(up)
	off := now.Sub(want)
	return want, off < -clockBehind || off > clockAhead
}

func (g *guest) setClock() error {
	if g.cfg.WallClock == 0 {
		return nil
	}
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return fmt.Errorf("cannot read the clock: %w", err)
	}
	now := time.Now()
	want, wrong := correctClock(now, time.Unix(0, g.cfg.WallClock), time.Duration(up.Nano()))
	if !wrong {
		return nil
	}
	note("the clock was off by %v", now.Sub(want).Round(time.Millisecond))
	return setClock(want)
}

func setClock(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("cannot set the clock: %w", err)
	}
	return nil
}
