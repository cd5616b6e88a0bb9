package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"banger/api"
	"banger/internal/config"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/store"
	"banger/internal/guest/wire"
	"banger/internal/netwire"
)

func TestMAC(t *testing.T) {
	if got := MAC("0a1b2c", 0x1234).String(); got != "02:0a:1b:2c:92:34" {
		t.Errorf("got %s", got)
	}
	seen := make(map[string]bool)
	for slot := 1; slot < 1<<15; slot += 7 {
		mac := MAC("ba6e00", slot) // whose first bytes are the gateway's
		if mac[0]&1 != 0 || mac[0]&2 == 0 || len(mac) != 6 {
			t.Fatalf("%s is no locally administered unicast address", mac)
		}
		if seen[mac.String()] || bytes.Equal(mac, netwire.GatewayMAC()) {
			t.Fatalf("%s belongs to another", mac)
		}
		seen[mac.String()] = true
	}
	if MAC("0a1b2c", 1).String() == MAC("0a1b2d", 1).String() {
		t.Error("two instances have the same")
	}
}

func many(n int, text func(n int) string) (all []string) {
	for k := range n {
		all = append(all, text(k))
	}
	return all
}

func TestCanonicalNetwork(t *testing.T) {
	rule := func(n int) string { return fmt.Sprintf("h%d.test", n) }
	port := func(n int) string { return fmt.Sprintf("127.0.0.1:%d:80/tcp", 1000+n) }
	for _, good := range []netwire.Network{
		{Preset: "none"},
		{Preset: "lan", Allow: []string{"a.test:443"}, Deny: []string{"a.test:443"}},
		{Preset: "internet", Allow: many(128, rule), Deny: many(128, rule)},
		{Preset: "host", Publish: many(64, port)},
		{Preset: "host", Publish: []string{"127.0.0.1:80:80/tcp", "127.0.0.1:80:80/udp", "127.0.0.2:80:80/tcp", "[::]:80:80/tcp"}},
	} {
		got, err := canonicalNetwork(good)
		if d := cmp.Diff(good, got); err != nil || d != "" {
			t.Errorf("%v, %s", err, d)
		}
	}
	got, err := canonicalNetwork(netwire.Network{Preset: "none", Allow: []string{"A.Test.", "a.test"}, Publish: []string{"80", "80:80"}})
	want := netwire.Network{Preset: "none", Allow: []string{"a.test"}, Publish: []string{"127.0.0.1:80:80/tcp"}}
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Errorf("%v, %s", err, d)
	}
	for name, bad := range map[string]netwire.Network{
		"no preset": {}, "preset": {Preset: "wan"},
		"rule":     {Preset: "none", Allow: []string{"a b c"}},
		"gateway":  {Preset: "host", Deny: []string{"tcp 10.0.2.2:5432"}},
		"rules":    {Preset: "none", Allow: many(257, rule)},
		"port":     {Preset: "none", Publish: []string{"70000"}},
		"ports":    {Preset: "none", Publish: many(65, port)},
		"twice":    {Preset: "none", Publish: []string{"80:80", "80:81"}},
		"wildcard": {Preset: "none", Publish: []string{"0.0.0.0:80:80", "127.0.0.1:80:80"}},
	} {
		if _, err := canonicalNetwork(bad); api.CodeOf(err) != api.Invalid || api.HintOf(err) != "banger set --help" {
			t.Errorf("%s: %v (%s, %s)", name, err, api.CodeOf(err), api.HintOf(err))
		}
	}
}

func TestApply(t *testing.T) {
	was := netwire.Network{
		Preset: "internet", Allow: []string{"a.test", "tcp b.test:443"}, Deny: []string{"c.test"},
		Publish: []string{"127.0.0.1:80:80/tcp", "127.0.0.1:80:80/udp", "127.0.0.2:80:81/tcp", "[::1]:90:90/tcp"},
	}
	for name, c := range map[string]struct {
		r    SetRequest
		want func(n *netwire.Network)
	}{
		"nothing":              {SetRequest{}, func(n *netwire.Network) {}},
		"preset":               {SetRequest{Preset: "none"}, func(n *netwire.Network) { n.Preset = "none" }},
		"again":                {SetRequest{Allow: []string{"A.test"}, Publish: []string{"80:80"}}, func(n *netwire.Network) {}},
		"the opposite":         {SetRequest{Deny: []string{"a.test"}}, func(n *netwire.Network) { n.Allow, n.Deny = n.Allow[1:], []string{"c.test", "a.test"} }},
		"the opposite, allow":  {SetRequest{Allow: []string{"c.test"}}, func(n *netwire.Network) { n.Allow, n.Deny = append(n.Allow, "c.test"), nil }},
		"forget":               {SetRequest{Forget: []string{"c.test", "tcp B.test:443"}}, func(n *netwire.Network) { n.Allow, n.Deny = n.Allow[:1], nil }},
		"forget and add":       {SetRequest{Forget: []string{"c.test"}, Deny: []string{"c.test"}}, func(n *netwire.Network) {}},
		"unpublish all":        {SetRequest{Unpublish: []string{"80"}}, func(n *netwire.Network) { n.Publish = n.Publish[3:] }},
		"unpublish protocol":   {SetRequest{Unpublish: []string{"80/udp"}}, func(n *netwire.Network) { n.Publish = append(n.Publish[:1:1], n.Publish[2:]...) }},
		"unpublish an address": {SetRequest{Unpublish: []string{"127.0.0.2:80", "[::1]:90/tcp"}}, func(n *netwire.Network) { n.Publish = n.Publish[:2] }},
		"another guest port": {SetRequest{Unpublish: []string{"[::1]:90"}, Publish: []string{"[::1]:90:91"}},
			func(n *netwire.Network) { n.Publish = append(n.Publish[:3:3], "[::1]:90:91/tcp") }},
	} {
		want, err := canonicalNetwork(was)
		if err != nil {
			t.Fatal(err)
		}
		c.want(&want)
		got, err := c.r.apply(was)
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("%s: %v, %s", name, err, d)
		}
		if len(was.Allow) != 2 || was.Deny[0] != "c.test" || len(was.Publish) != 4 {
			t.Fatalf("%s changed what was: %v", name, was)
		}
	}
	for _, c := range []struct {
		r    SetRequest
		code api.Code
		text string
	}{
		{SetRequest{Forget: []string{"z.test"}}, api.NotFound, "there is no rule z.test; the rules are a.test, tcp b.test:443, c.test"},
		{SetRequest{Forget: []string{"c.test", "c.test"}}, api.NotFound, "there is no rule c.test"},
		{SetRequest{Unpublish: []string{"80:80"}}, api.Invalid, `cannot read "80:80": "80" is no address of the host`},
		{SetRequest{Unpublish: []string{"90/udp"}}, api.NotFound, "port 90/udp is not published; published are 127.0.0.1:80:80/tcp"},
		{SetRequest{Publish: []string{"80:9"}}, api.Invalid, "127.0.0.1:80/tcp cannot lead to 9"},
		{SetRequest{Preset: "wan"}, api.Invalid, "wan"},
	} {
		got, err := c.r.apply(was)
		if api.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.text) || api.HintOf(err) == "" {
			t.Errorf("%+v: %v (%s)", c.r, err, api.CodeOf(err))
		}
		if d := cmp.Diff(was, got); d != "" {
			t.Errorf("%+v: %s", c.r, d)
		}
	}
}

// TestRefusedPort: the words for what a host says of a port.
func TestRefusedPort(t *testing.T) {
	web := netwire.Publication{Protocol: "tcp", Host: netip.MustParseAddrPort("127.0.0.1:80"), Guest: 80}
	dns := netwire.Publication{Protocol: "udp", Host: netip.MustParseAddrPort("[::1]:53"), Guest: 5353}
	for _, c := range []struct {
		p             netwire.Publication
		err           error
		hints         portHints
		holder        string
		code          api.Code
		message, hint string
	}{
		{web, unix.EADDRINUSE, startHints("v"), "", api.Busy, "port 127.0.0.1:80 is in use", "banger set v --unpublish 80"},
		{web, unix.EADDRINUSE, startHints("v"), "u", api.Busy, "port 127.0.0.1:80 is in use by the VM u", "banger set v --unpublish 80"},
		{dns, unix.EADDRINUSE, startHints("v"), "", api.Busy, "port [::1]:53/udp is in use", "banger set v --unpublish [::1]:53/udp"},
		{web, unix.EACCES, createHints(), "", api.Refused, "port 127.0.0.1:80: permission denied: ports below 1024 need rights", "banger create -p 8080:80"},
		{web, unix.EACCES, setHints("v"), "", api.Refused, "port 127.0.0.1:80: permission denied: ports below 1024 need rights", "banger set v -p 8080:80"},
		{web, unix.EACCES, startHints("v"), "", api.Refused, "port 127.0.0.1:80: permission denied: ports below 1024 need rights", "banger set v --unpublish 80 -p 8080:80"},
		{dns, unix.EADDRNOTAVAIL, startHints("v"), "", api.Invalid, "::1 is no address of this host", "ip address"},
		{web, unix.EMFILE, startHints("v"), "", api.Refused, "port 127.0.0.1:80: too many open files", "banger set v --unpublish 80"},
	} {
		e := &portError{c.p, &net.OpError{Op: "listen", Err: os.NewSyscallError("bind", c.err)}}
		err := e.inWords(c.hints, c.holder)
		if api.CodeOf(err) != c.code || err.Error() != c.message || api.HintOf(err) != c.hint {
			t.Errorf("%v: %v (%s: %s)", c.err, err, api.CodeOf(err), api.HintOf(err))
		}
	}
}

// TestTryPorts: a free port stays free, one that is busy costs a little patience, and what
// the hint names can be had.
func TestTryPorts(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	busy := fmt.Sprintf("%s:80/tcp", l.Addr())
	err = tryPorts(t.Context(), []string{busy})
	refused := new(portError)
	if !errors.Is(err, unix.EADDRINUSE) || !errors.As(err, &refused) || refused.p.String() != busy {
		t.Fatalf("a busy port: %v", err)
	}
	hint, ok := strings.CutPrefix(api.HintOf(refused.inWords(createHints(), "")), "banger create -p ")
	if !ok {
		t.Fatalf("the hint: %s", hint)
	}
	if err := tryPorts(t.Context(), []string{hint}); err != nil {
		t.Errorf("the port of the hint: %v", err)
	}
	if err := tryPorts(t.Context(), []string{busy[:strings.LastIndex(busy, "/")] + "/udp"}); err != nil {
		t.Errorf("the same port of the other protocol: %v", err)
	}
	l.Close()
	for range 2 {
		if err := tryPorts(t.Context(), []string{busy}); err != nil {
			t.Error(err)
		}
	}
}

// A VM that has come too late itself has no port.
func TestHasPort(t *testing.T) {
	const text = "0.0.0.0:8080:80/tcp"
	wanted, err := netwire.ParsePublication("8080:81")
	if err != nil {
		t.Fatal(err)
	}
	m := &Manager{layout: config.Layout{Root: t.TempDir()}}
	rec := store.VM{ID: "id"}
	dir := m.layout.VM(rec.ID).Path()
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	if m.hasPort(t.Context(), rec, text, wanted) {
		t.Error("a VM without a network has the port")
	}
	t.Chdir(dir) // for the short name
	l, err := net.Listen("unix", netwire.ControlSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	answers := make(chan netwire.Stats, 1)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 1<<10))
			stats := <-answers
			json.NewEncoder(conn).Encode(netwire.Reply{Stats: &stats})
			conn.Close()
		}
	}()
	for _, c := range []struct {
		stats netwire.Stats
		has   bool
	}{
		{netwire.Stats{}, true},
		{netwire.Stats{Problem: "busy", Busy: []string{text}}, false},
		{netwire.Stats{Problem: "busy", Busy: []string{"0.0.0.0:9090:80/tcp"}}, true},
		{netwire.Stats{Problem: "an earlier release's"}, false},
	} {
		answers <- c.stats
		if got := m.hasPort(t.Context(), rec, text, wanted); got != c.has {
			t.Errorf("%+v: %v", c.stats, got)
		}
	}
	if m.hasPort(t.Context(), rec, "9090:80", wanted) {
		t.Error("another port is taken for it") // and nobody was asked
	}
}

func TestMergePorts(t *testing.T) {
	got := mergePorts([]string{"127.0.0.1:8080:80/tcp", "0.0.0.0:8081:80/tcp", "127.0.0.1:5432:5432/tcp", "127.0.0.1:53:53/udp"}, []wire.Listening{
		{Protocol: "tcp", Address: "0.0.0.0", Port: 80, Process: "nginx\x1b[31m"},
		{Protocol: "tcp", Address: "127.0.0.1", Port: 5432, Process: "postgres"},
		{Protocol: "tcp", Address: "::", Port: 53},
		{Protocol: "udp", Address: "10.0.2.15", Port: 53},
		{Protocol: "tcp", Address: "nowhere", Port: 1}, {Protocol: "tcp", Address: "::1", Port: 70000}, {Protocol: "sctp", Address: "::", Port: 1},
	})
	want := []Port{
		{Protocol: "tcp", GuestAddress: "::", GuestPort: 53},
		{Protocol: "udp", GuestAddress: "10.0.2.15", GuestPort: 53, Published: "127.0.0.1:53"},
		{Protocol: "tcp", GuestAddress: "0.0.0.0", GuestPort: 80, Process: "nginx[31m", Published: "0.0.0.0:8081"},
		{Protocol: "tcp", GuestAddress: "0.0.0.0", GuestPort: 80, Process: "nginx[31m", Published: "127.0.0.1:8080"},
		{Protocol: "tcp", GuestPort: 5432, Published: "127.0.0.1:5432"},
		{Protocol: "tcp", GuestAddress: "127.0.0.1", GuestPort: 5432, Process: "postgres"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if n := len(mergePorts(nil, make([]wire.Listening, 1<<20))); n > maxListening {
		t.Errorf("%d ports of one guest", n)
	}
}

// TestEarlierRecord: a record.json that knows of no network asks for the internet.
func TestEarlierRecord(t *testing.T) {
	layout := config.Layout{Root: t.TempDir()}
	dir := layout.VM("id")
	if err := os.MkdirAll(dir.Path(), 0o700); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{`{"id":"id"}`: "internet", `{"id":"id","network":{"preset":"none"}}`: "none"} {
		if err := os.WriteFile(dir.Record(), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if rec, err := readRecord(dir); err != nil || rec.Network.Preset != want {
			t.Errorf("%s: %+v, %v", text, rec.Network, err)
		}
	}
}

// TestNetworkOf: what cannot be understood is the safest network, with the reason.
// Ports that the VM's own network holds are not tried: it makes room itself.
func TestNewPorts(t *testing.T) {
	for _, tt := range []struct{ was, to, want string }{
		{"", "8080:80", "127.0.0.1:8080:80/tcp"},
		{"8080:80", "8080:81", ""},
		{"8080:80", "0.0.0.0:8080:80", ""},
		{"0.0.0.0:8080:80", "8080:80", ""},
		{"8080:80", "8080:80/udp", "127.0.0.1:8080:80/udp"},
		{"8080:80", "127.0.0.2:8080:80", "127.0.0.2:8080:80/tcp"},
		{"8080:80", "[::]:8080:80", "[::]:8080:80/tcp"},
	} {
		network := func(text string) (n netwire.Network) {
			if text != "" {
				p, err := netwire.ParsePublication(text)
				if err != nil {
					t.Fatal(err)
				}
				n.Publish = []string{p.String()}
			}
			return n
		}
		if got := strings.Join(newPorts(network(tt.was), network(tt.to)), " "); got != tt.want {
			t.Errorf("%q to %q: %q is tried, want %q", tt.was, tt.to, got, tt.want)
		}
	}
}

func TestMissingCard(t *testing.T) {
	m := &Manager{programs: Programs{Net: "/banger-net"}}
	for modules, missing := range map[string]bool{
		"kernel/virtio-blk.ko.zst kernel/virtio_net.ko.zst": false,
		"kernel/virtio_blk.ko kernel/ext4.ko":               true,
		"":                                                  false, // all of it may be built in
	} {
		kernels := []store.Kernel{{Name: "other", Modules: []string{"virtio_blk.ko"}}, {Name: "k", Modules: strings.Fields(modules)}}
		if got := m.missingCard(store.VM{Kernel: "k"}, kernels); (got != "") != missing || missing && !strings.Contains(got, "banger kernel pull k") {
			t.Errorf("%q: %q", modules, got)
		}
	}
}

// Where VMs have no network, who asks for one is told, and who does not is not.
func TestNoNetwork(t *testing.T) {
	none := &Manager{ability: driver.Ability{NoNetwork: "QEMU is too old"}}
	there := &Manager{programs: Programs{Net: "/banger-net"}}
	if err := none.refuseNetwork("none", []string{"a.test"}, nil); api.CodeOf(err) != api.Refused {
		t.Errorf("a rule: %v", err)
	}
	if got := none.missingCard(store.VM{Network: netwire.Network{Preset: "none", Deny: []string{"a.test"}}}, nil); got != "" {
		t.Errorf("a record that denies all the same: %q", got)
	}
	for _, c := range []struct {
		n      netwire.Network
		wanted bool
	}{
		{netwire.Network{}, false},
		{netwire.Network{Preset: "none"}, false},
		{netwire.Network{Preset: "internet"}, true},
		{netwire.Network{Preset: "none", Allow: []string{"a.test"}}, true},
		{netwire.Network{Publish: []string{"80:80"}}, true},
	} {
		err := none.refuseNetwork(c.n.Preset, c.n.Allow, c.n.Publish)
		if (err != nil) != c.wanted || c.wanted && (api.CodeOf(err) != api.Refused || !strings.Contains(err.Error(), "QEMU is too old") || api.HintOf(err) == "") {
			t.Errorf("%+v: %v", c.n, err)
		}
		if err := there.refuseNetwork(c.n.Preset, c.n.Allow, c.n.Publish); err != nil {
			t.Errorf("%+v, with a network: %v", c.n, err)
		}
		if got := none.missingCard(store.VM{Network: c.n}, nil); (got != "") != c.wanted {
			t.Errorf("%+v: the problem is %q", c.n, got)
		}
	}
}

func TestNetworkOf(t *testing.T) {
	for _, rec := range []store.VM{
		{NetworkProblem: "damaged", Network: netwire.Network{Preset: "none"}},
		{Network: netwire.Network{Preset: "a later release's"}},
		{Network: netwire.Network{Preset: "host", Allow: []string{"a b c"}}},
	} {
		n, problem := networkOf(rec)
		if d := cmp.Diff(netwire.Network{Preset: "none"}, n); d != "" || problem == "" {
			t.Errorf("%v: %s, %q", rec.Network, d, problem)
		}
	}
	if n, problem := networkOf(store.VM{Network: netwire.Network{Preset: "lan"}}); n.Preset != "lan" || problem != "" {
		t.Errorf("%v, %q", n, problem)
	}
}

// logWriter writes a VM's log as banger-net does.
type logWriter struct {
	t   *testing.T
	dir string
}

func (w logWriter) write(text string) {
	w.t.Helper()
	f, err := os.OpenFile(filepath.Join(w.dir, netwire.LogFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = f.WriteString(text)
		f.Close()
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w logWriter) entry(reason string) {
	w.write(fmt.Sprintf("{\"reason\":%q,\"count\":1}\n", reason))
}

func (w logWriter) rotate() {
	w.t.Helper()
	if err := os.Rename(filepath.Join(w.dir, netwire.LogFile), filepath.Join(w.dir, netwire.LogOld)); err != nil {
		w.t.Fatal(err)
	}
}

func TestNetworkLogReader(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "log"), 0o700); err != nil {
		t.Fatal(err)
	}
	w := logWriter{t, dir}
	var got []string
	r := networkLog{dir: dir, send: func(e netwire.Entry) error { got = append(got, e.Reason); return nil }}
	defer r.close()
	expect := func(when string, err error, want ...string) {
		t.Helper()
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("%s: %v, %s", when, err, d)
		}
		got = nil
	}
	expect("no log", r.begin())
	expect("still none", r.poll())
	w.entry("one")
	w.write("not JSON\n{}\n[1]\n")
	w.write(`{"reason":"` + strings.Repeat("x", logLine) + `"}` + "\n")
	w.entry("two")
	w.write(`{"reason":"th`)
	expect("half a line", r.poll(), "one", "two")
	w.write("ree\"}\n")
	expect("its other half", r.poll(), "three")
	expect("nothing new", r.poll())
	w.entry("four")
	w.rotate()
	w.entry("five")
	expect("a rotation", r.poll(), "four", "five")
	w.rotate()
	expect("rotated, nothing new", r.poll())
	w.entry("six")
	expect("a new file", r.poll(), "six")

	all := networkLog{dir: dir, send: r.send}
	defer all.close()
	expect("from the beginning", all.begin(), "five", "six")
	if err := os.Truncate(filepath.Join(dir, netwire.LogFile), 0); err != nil {
		t.Fatal(err)
	}
	w.write("{\"reason\":\"7\"}\n") // shorter than what was read
	expect("cut short", r.poll(), "7")
	expect("cut short", all.poll(), "7")
}
