package netwire

import (
	"strings"
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
		if p.Guest == 0 || p.Host.Port() == 0 || !p.Host.Addr().IsValid() {
			t.Errorf("%q is %v", text, p)
		}
	})
}
