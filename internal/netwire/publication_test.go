package netwire

import (
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
)

func TestParsePublication(t *testing.T) {
	for text, want := range map[string]string{
		"8080:80":                "127.0.0.1:8080:80/tcp",
		"80":                     "127.0.0.1:80:80/tcp",
		"53/udp":                 "127.0.0.1:53:53/udp",
		"0.0.0.0:8080:80":        "0.0.0.0:8080:80/tcp",
		"192.0.2.7:8080:80/udp":  "192.0.2.7:8080:80/udp",
		"[::1]:8080:80":          "[::1]:8080:80/tcp",
		"[::]:8080:80/tcp":       "[::]:8080:80/tcp",
		"65535:1":                "127.0.0.1:65535:1/tcp",
		"[::ffff:127.0.0.1]:1:2": "127.0.0.1:1:2/tcp",
	} {
		p, err := ParsePublication(text)
		if err != nil || p.String() != want {
			t.Errorf("%q is %s, %v; want %s", text, p, err, want)
		}
	}
	for text, word := range map[string]string{
		"":                     "no port",
		"0":                    "no port",
		"0:80":                 "no port",
		"65536":                "no port",
		"+80:80":               "no port",
		"-1:80":                "no port",
		"80:":                  "no port",
		":80":                  "no port",
		"http":                 "no port",
		"8080:80/sctp":         "tcp or udp",
		"8080:80/":             "tcp or udp",
		"8080:80/tcp/x":        "tcp or udp",
		"host:8080:80":         "no address",
		"::1:8080:80":          "brackets",
		"[fe80::1%1]:80":       "brackets",
		"[fe80::1%lo]:8080:80": "no address",
		"1.2.3:8080:80":        "no address",
	} {
		if p, err := ParsePublication(text); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%q is %s, %v; want words with %q", text, p, err, word)
		}
	}
}

func TestHostSide(t *testing.T) {
	publication := func(text string) Publication {
		p, err := ParsePublication(text)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	all := []string{"8080:80", "8080:80/udp", "127.0.0.2:8080:80", "[::1]:8080:8080", "8081:8080"}
	for text, want := range map[string]string{
		"8080":                    "8080:80 8080:80/udp 127.0.0.2:8080:80 [::1]:8080:8080",
		"8080/udp":                "8080:80/udp",
		"127.0.0.1:8080":          "8080:80 8080:80/udp",
		"127.0.0.1:8080/tcp":      "8080:80",
		"[::ffff:127.0.0.2]:8080": "127.0.0.2:8080:80",
		"[::1]:8080/tcp":          "[::1]:8080:8080",
		"80":                      "",
	} {
		side, err := ParseHostSide(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		var got []string
		for _, one := range all {
			if p := publication(one); side.Fits(p) {
				got = append(got, p.Short())
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q fits %q, not %q", text, got, want)
		}
	}
	for _, one := range all {
		p := publication(one)
		if p.Short() != one || publication(p.Short()) != p {
			t.Errorf("%s is %s in short", one, p.Short())
		}
		if side, err := ParseHostSide(p.ShortHostSide()); err != nil || !side.Fits(p) {
			t.Errorf("%s has the side %s: %v", one, p.ShortHostSide(), err)
		}
	}
	for text, word := range map[string]string{
		"": "no port", "0": "no port", "x": `cannot read "x": "x" is no port`, "8080:80": "no address", "80/": "tcp or udp",
		"::1:80": "brackets", "127.0.0.1:": "no port", "80/sctp": "tcp or udp",
	} {
		if side, err := ParseHostSide(text); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%q is %v, %v; want words with %q", text, side, err, word)
		}
	}
}

func TestClash(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		free bool
	}{
		{"80:80", "80:80", true},
		{"80:80", "80:81", false},
		{"80:80", "80:81/udp", true},
		{"80:80", "0.0.0.0:80:80", false},
		{"80:80", "[::]:80:80", true},
		{"[::1]:80:80", "[::]:80:80", false},
		{"80:80", "127.0.0.2:80:80", true},
		{"80:80", "81:80", true},
	} {
		a, err := ParsePublication(tt.a)
		b, berr := ParsePublication(tt.b)
		if err != nil || berr != nil {
			t.Fatal(err, berr)
		}
		if one, other := a.Clash(b), b.Clash(a); (one == nil) != tt.free || (other == nil) != tt.free {
			t.Errorf("%s and %s: %v, %v", tt.a, tt.b, one, other)
		}
	}
}

func TestRefused(t *testing.T) {
	for text, words := range map[string]map[syscall.Errno]string{
		"127.0.0.1:8080:80": {
			syscall.EADDRINUSE: "port 127.0.0.1:8080 is in use",
			syscall.EACCES:     "port 127.0.0.1:8080: permission denied",
		},
		"[::1]:53:53/udp": {
			syscall.EADDRINUSE:    "port [::1]:53/udp is in use",
			syscall.EACCES:        "port [::1]:53/udp: permission denied: ports below 1024 need rights",
			syscall.EADDRNOTAVAIL: "::1 is no address of this host",
			syscall.EMFILE:        "port [::1]:53/udp: too many open files",
		},
	} {
		p, err := ParsePublication(text)
		if err != nil {
			t.Fatal(err)
		}
		for errno, want := range words {
			got := p.Refused(&net.OpError{Op: "listen", Err: os.NewSyscallError("bind", errno)})
			if got != want {
				t.Errorf("%v: %s, want %s", errno, got, want)
			}
		}
	}
}

func FuzzParsePublication(f *testing.F) {
	for _, seed := range []string{"8080:80", "[::1]:1:2/udp", "0.0.0.0:1:2", "1/tcp", ":::", "[:1:2"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParsePublication(text)
		if err != nil {
			return
		}
		again, err := ParsePublication(p.String())
		if err != nil || again != p {
			t.Errorf("%q is %v, which is read as %v, %v", text, p, again, err)
		}
		if short, err := ParsePublication(p.Short()); err != nil || short != p {
			t.Errorf("%v is %q in short, which is read as %v, %v", p, p.Short(), short, err)
		}
		if side, err := ParseHostSide(p.ShortHostSide()); err != nil || !side.Fits(p) {
			t.Errorf("%v has the side %q, which is read as %v, %v", p, p.ShortHostSide(), side, err)
		}
		if p.Guest == 0 || p.Host.Port() == 0 || !p.Host.Addr().IsValid() {
			t.Errorf("%q is %v", text, p)
		}
	})
}
