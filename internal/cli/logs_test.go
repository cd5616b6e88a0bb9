package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
)

// refusals are n entries, a second apart from each other.
func refusals(n int) []*bangerv1.NetworkLogEntry {
	var out []*bangerv1.NetworkLogEntry
	for i := range n {
		out = append(out, &bangerv1.NetworkLogEntry{At: stamp(now().Add(time.Duration(i-100) * time.Second)), Protocol: "tcp",
			Target: fmt.Sprintf("192.168.1.%d:80", i+1), Reason: "private network", Count: 1})
	}
	return out
}

func TestRefusalLine(t *testing.T) {
	at := now().Add(-10 * time.Minute)
	local := at.Local().Format(time.TimeOnly)
	for _, c := range []struct {
		entry *bangerv1.NetworkLogEntry
		want  string
	}{
		{&bangerv1.NetworkLogEntry{Protocol: "tcp", Target: "192.168.1.1:80", Reason: "private network", Rule: "192.168.1.1:80", Count: 1},
			local + " refused tcp 192.168.1.1:80 private network      hint: banger set shop --allow 192.168.1.1:80"},
		{&bangerv1.NetworkLogEntry{Protocol: "tcp", Target: "192.168.1.1:80", Name: "nas.lan", Reason: "private network", Rule: "tcp *.lan:80", Count: 12},
			local + " refused tcp 192.168.1.1:80 (nas.lan) private network (×12)  hint: banger set shop --allow 'tcp *.lan:80'"},
		{&bangerv1.NetworkLogEntry{Protocol: "ethernet", Target: "02:00:00:00:00:01", Reason: "foreign sender"},
			local + " refused ethernet 02:00:00:00:00:01 foreign sender"},
		{&bangerv1.NetworkLogEntry{Protocol: "dns", Target: "nas.lan → 192.168.1.1", Name: "nas.lan", Reason: "answer left out: private network"},
			local + " refused dns nas.lan → 192.168.1.1 answer left out: private network"},
		{&bangerv1.NetworkLogEntry{Protocol: "icmp", Target: "192.0.2.1", Reason: "the host lets this user send no echo requests: sysctl net.ipv4.ping_group_range", Count: 2,
			Hint: `sudo sysctl -w net.ipv4.ping_group_range="0 2147483647"`},
			local + " refused icmp 192.0.2.1 the host lets this user send no echo requests: sysctl net.ipv4.ping_group_range (×2)" +
				`  hint: sudo sysctl -w net.ipv4.ping_group_range="0 2147483647"`},
		{&bangerv1.NetworkLogEntry{Protocol: "tcp", Target: "192.0.2.1:80", Reason: "the host has no network that leads there", Hint: "ip\nroute"},
			local + " refused tcp 192.0.2.1:80 the host has no network that leads there  hint: ip route"},
		{&bangerv1.NetworkLogEntry{Protocol: "dns", Target: "192.0.2.53:53", Reason: "the host's resolver does not answer"},
			local + " refused dns 192.0.2.53:53 the host's resolver does not answer"},
		{&bangerv1.NetworkLogEntry{Event: "cut", Target: "all connections", Reason: "together they held too much memory", Count: 1},
			local + " cut all connections together they held too much memory"},
		{&bangerv1.NetworkLogEntry{Protocol: "dns", Target: "a\x1b[31m\nb.test", Reason: "not on the allow-list", Rule: "x\ny;'"},
			local + ` refused dns a\x1b[31m b.test not on the allow-list  hint: banger set shop --allow 'x y;'\'''`},
	} {
		c.entry.At = timestamppb.New(at)
		want(t, "line", refusalLine(c.entry, "shop", now()), c.want)
	}
	old := &bangerv1.NetworkLogEntry{At: stamp(now().Add(-48 * time.Hour)), Protocol: "tcp", Target: "x"}
	want(t, "another day", strings.Fields(refusalLine(old, "shop", now()))[0], now().Add(-48*time.Hour).Local().Format(time.DateOnly))
}

func TestLogs(t *testing.T) {
	d := withShop(t)
	d.net.entries = refusals(5)
	for args, hosts := range map[string]string{
		"": "1 2 3 4 5", "--tail 2": "4 5", "--tail 9": "1 2 3 4 5", "--tail 0": "", "-f": "1 2 3 4 5", "-f --tail 1": "5",
	} {
		r := d.run(append([]string{"logs", "shop", "--network"}, strings.Fields(args)...)...)
		want(t, args, r.code, 0)
		want(t, args, hostsIn(r.out), hosts)
	}
	d.net.entries[0].Name = "evil\u009b"
	r := d.run("logs", "--network", "--format", "json")
	lines, err := jsonLines[struct{ Target, Name, Reason string }](r.out)
	if err != nil || len(lines) != 5 || lines[4].Target != "192.168.1.5:80" || lines[4].Reason != "private network" {
		t.Errorf("json: %v %+v", err, lines)
	}
	if strings.Contains(r.out, "\u009b") {
		t.Error("a control character came through in JSON")
	}
	want(t, "no such VM", d.run("logs", "nope", "--network").code, 3)
}

// hostsIn are the last numbers of the addresses that were refused.
func hostsIn(out string) string {
	var hosts []string
	for line := range strings.Lines(out) {
		var host int
		fmt.Sscanf(line[strings.Index(line, "192.168.1."):], "192.168.1.%d:80", &host)
		hosts = append(hosts, fmt.Sprint(host))
	}
	return strings.Join(hosts, " ")
}

// TestLogsFollow: a daemon that goes away is followed by the next, nothing comes twice,
// and Ctrl-C ends it.
func TestLogsFollow(t *testing.T) {
	d := withShop(t)
	all := refusals(6)
	// Counted repeats are written late, with the time of the first of them.
	all[3].At, all[5].At = all[1].At, all[1].At
	written := func(entries []*bangerv1.NetworkLogEntry) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.net.entries = entries
	}
	written(all[:3])
	streams := 0
	d.net.more = func(ctx context.Context, send func(*bangerv1.NetworkLogEntry) error) error {
		streams++
		switch streams {
		case 1: // this one is about to end
			written(all[:4])
			if err := send(all[3]); err != nil {
				return err
			}
			return api.Errorf(api.Stopping, "the daemon is about to end")
		case 2: // it ends again before it has sent all that is known
			return api.Errorf(api.Stopping, "the daemon is about to end")
		case 3: // the next one is killed
			written(all[:5])
			if err := send(all[4]); err != nil {
				return err
			}
			d.drop()
			return errors.New("killed")
		case 4: // the log is rotated, and the rest comes while nobody is there
			written(all[2:6])
			return api.Errorf(api.Stopping, "the daemon is about to end")
		case 5: // it is rotated again, and nothing new has come
			written(all[3:6])
			return api.Errorf(api.Stopping, "the daemon is about to end")
		}
		<-ctx.Done()
		return ctx.Err()
	}
	call := d.call().start("logs", "--network", "-f", "--tail", "2")
	eventually(t, "all lines", func() bool { return strings.Count(call.out.String(), "\n") >= 5 })
	call.kill(syscall.SIGINT)
	want(t, "exit code", call.wait(), 130)
	want(t, "lines", hostsIn(call.out.String()), "2 3 4 5 6")
	want(t, "stderr", call.err.String(), "banger: interrupted\n")
}

// TestLogsFollowLost: a log that was written over meanwhile is read on from its beginning,
// and what is lost is said, once.
func TestLogsFollowLost(t *testing.T) {
	d := withShop(t)
	all := refusals(9)
	d.net.entries = all[:4]
	streams := 0
	d.net.more = func(ctx context.Context, send func(*bangerv1.NetworkLogEntry) error) error {
		streams++
		if streams == 1 {
			d.mu.Lock()
			d.net.entries = all[6:8] // fewer than were read
			d.mu.Unlock()
			return api.Errorf(api.Stopping, "the daemon is about to end")
		}
		if err := send(all[8]); err != nil {
			return err
		}
		<-ctx.Done()
		return ctx.Err()
	}
	call := d.call().start("-q", "logs", "--network", "-f")
	eventually(t, "all lines", func() bool { return strings.Count(call.out.String(), "\n") >= 7 })
	call.kill(syscall.SIGINT)
	want(t, "exit code", call.wait(), 130)
	want(t, "lines", hostsIn(call.out.String()), "1 2 3 4 7 8 9")
	want(t, "stderr", call.err.String(), "some refusals are lost here: the log was written over before they were read\nbanger: interrupted\n")
}
