package imagemgr

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMirrors(t *testing.T) {
	for _, tc := range []struct{ name, targets, main, security string }{
		{"nothing", "", "", ""},
		{"Debian", "Debian|Debian|main|http://m.example/debian/\nDebian|Debian-Security|main|https://s.example/sec/\n",
			"http://m.example/debian", "https://s.example/sec"},
		{"the first counts", "Debian|Debian|main|http://a.example/debian/\nDebian|Debian|main|http://b.example/debian/\n", "http://a.example/debian", ""},
		{"Ubuntu", "Ubuntu|Ubuntu|main|http://archive.example/ubuntu/\n", "", ""},
		{"another vendor's", "Docker|Docker CE|main|https://download.example/linux/debian/\n", "", ""},
		{"another component", "Debian|Debian|contrib|http://m.example/debian/\n", "", ""},
		{"before the first update", "$(ORIGIN)|$(LABEL)|main|http://m.example/debian/\n$(ORIGIN)|$(LABEL)|main|http://m.example/debian-security/\n",
			"http://m.example/debian", "http://m.example/debian-security"},
		{"before the first update, another vendor's", "$(ORIGIN)|$(LABEL)|stable|https://download.example/linux/debian/\n", "", ""},
		{"no network", "Debian|Debian|main|file:/srv/debian/\nDebian|Debian|main|cdrom://x/debian/\n", "", ""},
		{"garbage", "a|b\n\n|||||||\n", "", ""},
	} {
		main, security := mirrors(tc.targets)
		if main != tc.main || security != tc.security {
			t.Errorf("%s: got %q and %q, want %q and %q", tc.name, main, security, tc.main, tc.security)
		}
	}
}

func TestHostOptions(t *testing.T) {
	dump := `APT "";
APT::Architecture "arm64";
Acquire "";
Acquire::http "";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::https::Proxy::deb.example "DIRECT";
Acquire::https::CaInfo "/etc/ssl/own.pem";
Acquire::AllowInsecureRepositories "1";
Acquire::Check-Valid-Until "false";
Acquire::ForceIPv4 "true";
DPkg::Post-Invoke:: "rm -rf /";
Acquire::http::Proxy "evil"; DPkg::Post-Invoke "x";
Dir::Etc::trusted "/tmp/keys";
`
	want := []string{
		`Acquire::http::Proxy "http://proxy.example:3128";`,
		`Acquire::https::Proxy::deb.example "DIRECT";`,
		`Acquire::https::CaInfo "/etc/ssl/own.pem";`,
		`Acquire::Check-Valid-Until "false";`,
		`Acquire::ForceIPv4 "true";`,
	}
	if diff := cmp.Diff(want, hostOptions(dump)); diff != "" {
		t.Error(diff)
	}
}

func TestRealPackage(t *testing.T) {
	show := "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nDepends: libc6, linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\nDescription: x\n"
	if name, err := realPackage(show); err != nil || name != "linux-image-6.1.0-56-cloud-amd64" {
		t.Errorf("got %q, %v", name, err)
	}
	for _, show := range []string{"", "Package: x\n", "Depends: linux-image-amd64, libc6\n", "Depends: linux-image-6.1/../x\n", "Depends: -o\n"} {
		if name, err := realPackage(show); err == nil {
			t.Errorf("%q: %q counted as a kernel", show, name)
		}
	}
}

func TestParseDownload(t *testing.T) {
	d, err := parseDownload("Reading...\n'http://mirror.test/pool/k_1%3a2_amd64.deb' k_1%3a2_amd64.deb 26713492 SHA256:e7d0\n")
	if err != nil || d != (download{file: "k_1%3a2_amd64.deb", size: 26713492}) {
		t.Errorf("got %+v, %v", d, err)
	}
	for _, bad := range []string{"", "'u' ../k.deb 5 SHA256:0\n", "'u' k.txt 5 SHA256:0\n", "u k.deb 5 SHA256:0\n", "'u' k.deb x SHA256:0\n"} {
		if d, err := parseDownload(bad); err == nil {
			t.Errorf("%q: got %+v", bad, d)
		}
	}
}

// What apt is told must not depend on the host's apt, and must not touch its state.
func TestNewAptKeepsToItself(t *testing.T) {
	dir := t.TempDir()
	a := archive{main: PublicMain, security: publicSecurity, keyring: "/k.gpg", options: []string{`Acquire::http::Proxy "http://p:1";`}}
	apt, err := newApt(dir, a, "bookworm")
	if err != nil {
		t.Fatal(err)
	}
	conf, err := os.ReadFile(filepath.Join(dir, "apt.conf"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(strings.TrimSpace(string(conf)), "\n") {
		if strings.HasPrefix(line, "Dir") && !strings.Contains(line, `"`+dir) && !strings.HasSuffix(line, `"";`) {
			t.Errorf("outside of %s: %s", dir, line)
		}
	}
	if !strings.Contains(string(conf), `Acquire::http::Proxy "http://p:1";`) {
		t.Error("the proxy is lost")
	}
	sources, err := os.ReadFile(filepath.Join(dir, "etc/sources.list"))
	if err != nil {
		t.Fatal(err)
	}
	const from = "deb [arch=amd64 signed-by=/k.gpg] "
	want := from + PublicMain + " bookworm main\n" + from + PublicMain + " bookworm-updates main\n" +
		from + publicSecurity + " bookworm-security main\n"
	if diff := cmp.Diff(want, string(sources)); diff != "" {
		t.Error(diff)
	}
	if !slices.Contains(apt.env, "APT_CONFIG="+filepath.Join(dir, "apt.conf")) {
		t.Error("apt is not told of its configuration")
	}
}

func TestNetworkEnvironment(t *testing.T) {
	t.Setenv("http_proxy", "http://p:1")
	t.Setenv("NO_PROXY", "localhost")
	t.Setenv("TMPDIR", "/elsewhere")
	t.Setenv("APT_CONFIG", "/evil")
	env := network("TMPDIR=/scratch")
	for _, want := range []string{"http_proxy=http://p:1", "NO_PROXY=localhost", "TMPDIR=/scratch"} {
		if !slices.Contains(env, want) {
			t.Errorf("lacks %s", want)
		}
	}
	for _, kv := range env {
		if kv == "TMPDIR=/elsewhere" || strings.HasPrefix(kv, "APT_CONFIG=") {
			t.Errorf("has %s", kv)
		}
	}
}
