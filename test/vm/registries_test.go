package vm

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"

	"banger/internal/daemon/imagemgr"
)

// ownResolver is the resolver of the host for these tests, beside the world's.
const ownResolver = "203.0.113.54"

// namelessAddress has the git server, too, and no name leads there.
const namelessAddress = allowedTest

// registries are the servers that package managers ask, all of them at port 80 of one
// address of the world, each by its name: apt.test, git.test, go.test, npm.test and
// pypi.test. What they serve is made by the test, and they write down who asked for what.
type registries struct {
	t    testing.TB
	w    *world
	debs string // directory
	git  http.Handler

	head         string            // of the git repository
	npmIntegrity string            // of the package greeting
	files        map[string][]byte // "HOST/PATH", of all but apt and git

	mu       sync.Mutex
	packages string // apt's index
	requests []string
	lookups  map[string]bool
}

func newRegistries(t testing.TB) *registries {
	t.Helper()
	w := newWorld(t)
	s := &registries{t: t, w: w, debs: t.TempDir(), files: make(map[string][]byte), lookups: make(map[string]bool)}
	s.git = s.serveGit()
	s.makePackages()
	server := &http.Server{Handler: s}
	for _, a := range []string{peerAddress, namelessAddress} {
		go server.Serve(w.peer.listen(a + ":80"))
	}
	t.Cleanup(func() { server.Close() })

	w.peer.ip("addr", "add", ownResolver+"/24", "dev", "cable")
	resolver := &dns.Server{PacketConn: w.peer.listenPacket(ownResolver + ":53"), Handler: s}
	started := make(chan struct{})
	resolver.NotifyStartedFunc = func() { close(started) }
	go resolver.ActivateAndServe()
	<-started
	t.Cleanup(func() { resolver.Shutdown() })
	w.host.run("sh", "-c", "echo nameserver "+ownResolver+" > /etc/resolv.conf")
	return s
}

// ServeDNS knows all names below test.
func (s *registries) ServeDNS(rw dns.ResponseWriter, question *dns.Msg) {
	q := question.Question[0]
	name := dns.CanonicalName(q.Name)
	s.mu.Lock()
	s.lookups[name] = true
	s.mu.Unlock()
	answer := new(dns.Msg)
	answer.SetReply(question)
	switch {
	case !strings.HasSuffix(name, ".test."):
		answer.Rcode = dns.RcodeNameError
	case q.Qtype == dns.TypeA:
		answer.Answer = []dns.RR{&dns.A{
			Hdr: dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: 60}, A: net.ParseIP(peerAddress).To4(),
		}}
	}
	rw.WriteMsg(answer)
}

func (s *registries) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	name := path.Clean(r.URL.Path)
	if strings.HasSuffix(r.URL.Path, "/") {
		name += "/"
	}
	s.mu.Lock()
	s.requests = append(s.requests, r.Host+" "+r.Method+" "+name)
	index := s.packages
	s.mu.Unlock()
	data, known := s.files[r.Host+name]
	switch {
	case r.Host == "git.test" || r.Host == namelessAddress:
		s.git.ServeHTTP(rw, r)
	case r.Host == "apt.test" && name == "/Packages":
		fmt.Fprint(rw, index)
	case r.Host == "apt.test" && strings.HasSuffix(name, ".deb"):
		http.ServeFile(rw, r, filepath.Join(s.debs, filepath.Base(name)))
	case known:
		if strings.HasSuffix(name, "/") {
			rw.Header().Set("Content-Type", "text/html")
		}
		rw.Write(data)
	default:
		http.NotFound(rw, r)
	}
}

// asked is all requests so far, as "HOST METHOD PATH".
func (s *registries) asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// wantAsked wants requests to have come: what is there can have come by no other way.
func (s *registries) wantAsked(t testing.TB, requests ...string) {
	t.Helper()
	asked := s.asked()
	for _, r := range requests {
		if !slices.Contains(asked, r) {
			t.Errorf("nobody asked %q, but:\n%s", r, strings.Join(asked, "\n"))
		}
	}
}

// names is all names that the resolver was asked for.
func (s *registries) names() (names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range s.lookups {
		names = append(names, name)
	}
	return names
}

// packedFile is one file of an archive.
type packedFile struct{ name, text string }

// makePackages makes the package "greeting" 1.0.0 for Go, npm and pip.
func (s *registries) makePackages() {
	const module = "greeting.test/go@v1.0.0/"
	goMod := "module greeting.test/go\n\ngo 1.21\n"
	s.files["go.test/greeting.test/go/@v/list"] = []byte("v1.0.0\n")
	s.files["go.test/greeting.test/go/@v/v1.0.0.info"] = []byte(`{"Version": "v1.0.0", "Time": "2024-01-01T00:00:00Z"}`)
	s.files["go.test/greeting.test/go/@v/v1.0.0.mod"] = []byte(goMod)
	s.files["go.test/greeting.test/go/@v/v1.0.0.zip"] = s.zip(
		packedFile{module + "go.mod", goMod},
		packedFile{module + "greeting.go", "package greeting\n"},
		packedFile{module + "greeting.txt", greeting + "\n"})

	tarball := s.tarball(
		packedFile{"package/package.json", `{"name": "greeting", "version": "1.0.0", "main": "index.js"}`},
		packedFile{"package/index.js", fmt.Sprintf("module.exports = %q\n", greeting)})
	sum := sha512.Sum512(tarball)
	s.npmIntegrity = "sha512-" + base64.StdEncoding.EncodeToString(sum[:])
	s.files["npm.test/greeting/-/greeting-1.0.0.tgz"] = tarball

	const wheel, info = "greeting-1.0.0-py3-none-any.whl", "greeting-1.0.0.dist-info/"
	data := s.zip(
		packedFile{"greeting.py", fmt.Sprintf("text = %q\n", greeting)},
		packedFile{info + "METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0.0\n"},
		packedFile{info + "WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"},
		packedFile{info + "RECORD", "greeting.py,,\n" + info + "METADATA,,\n" + info + "WHEEL,,\n" + info + "RECORD,,\n"})
	s.files["pypi.test/files/"+wheel] = data
	s.files["pypi.test/simple/greeting/"] = fmt.Appendf(nil, "<!DOCTYPE html><html><body><a href=\"/files/%s#sha256=%x\">%[1]s</a></body></html>\n", wheel, sha256.Sum256(data))
}

func (s *registries) zip(files ...packedFile) []byte {
	var packed bytes.Buffer
	archive := zip.NewWriter(&packed)
	for _, f := range files {
		w, err := archive.Create(f.name)
		if err == nil {
			_, err = w.Write([]byte(f.text))
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	if err := archive.Close(); err != nil {
		s.t.Fatal(err)
	}
	return packed.Bytes()
}

func (s *registries) tarball(files ...packedFile) []byte {
	var packed bytes.Buffer
	zipped := gzip.NewWriter(&packed)
	archive := tar.NewWriter(zipped)
	for _, f := range files {
		err := archive.WriteHeader(&tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.text))})
		if err == nil {
			_, err = archive.Write([]byte(f.text))
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	if err := archive.Close(); err != nil {
		s.t.Fatal(err)
	}
	if err := zipped.Close(); err != nil {
		s.t.Fatal(err)
	}
	return packed.Bytes()
}

// deb is a Debian package that is being made.
type deb struct {
	t       testing.TB
	name    string
	depends []string
	dir     string // its files
}

func newDeb(t testing.TB, name string, depends ...string) *deb {
	return &deb{t: t, name: name, depends: depends, dir: t.TempDir()}
}

// copy takes over a file or a directory of the host.
func (d *deb) copy(from, to string) {
	d.t.Helper()
	to = filepath.Join(d.dir, to)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		d.t.Fatal(err)
	}
	output(d.t, "cp", "-rL", "--preserve=mode", from, to)
}

func (d *deb) write(name string, mode os.FileMode, text string) {
	d.t.Helper()
	write(d.t, filepath.Join(d.dir, name), text)
	if err := os.Chmod(filepath.Join(d.dir, name), mode); err != nil {
		d.t.Fatal(err)
	}
}

// pack makes one file, NAME.tar, of a directory of thousands: to dpkg under software
// emulation each costs as much as a megabyte.
func (d *deb) pack(name string) {
	d.t.Helper()
	dir := filepath.Join(d.dir, name)
	output(d.t, "tar", "-C", dir, "--owner=0", "--group=0", "-cf", dir+".tar", ".")
	if err := os.RemoveAll(dir); err != nil {
		d.t.Fatal(err)
	}
}

// addDebs adds packages to what apt.test has.
func (s *registries) addDebs(debs ...*deb) {
	for _, d := range debs {
		control := fmt.Sprintf("Package: %s\nVersion: 1\nArchitecture: amd64\nMaintainer: test <test@test.test>\nDescription: of the test\n", d.name)
		if len(d.depends) > 0 {
			control += "Depends: " + strings.Join(d.depends, ", ") + "\n"
		}
		d.write("DEBIAN/control", 0o644, control)
		file := filepath.Join(s.debs, d.name+".deb")
		// Unpacked costs a guest under software emulation less, and the network has more to do.
		output(d.t, "dpkg-deb", "--root-owner-group", "-Znone", "--build", d.dir, file)
		data, err := os.ReadFile(file)
		if err != nil {
			d.t.Fatal(err)
		}
		s.mu.Lock()
		s.packages += fmt.Sprintf("%sFilename: ./%s.deb\nSize: %d\nSHA256: %x\n\n", control, d.name, len(data), sha256.Sum256(data))
		s.mu.Unlock()
	}
}

// pythonDebs are the files of Debian's Python and pip for the guest, whatever the host is;
// they are fetched once and kept, as kernel and image are.
func pythonDebs(t testing.TB) []string {
	t.Helper()
	names := []string{"python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "python3-pip-whl"}
	kept := filepath.Join(cacheDir(t), "python-debs")
	if _, err := os.Stat(kept); err != nil {
		dir, err := os.MkdirTemp(cacheDir(t), "python-debs-*")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		downloadDebs(t, dir, names)
		// Another process may have been first.
		if err := os.Rename(dir, kept); err != nil {
			if _, missing := os.Stat(kept); missing != nil {
				t.Fatal(err)
			}
		}
	}
	paths, err := filepath.Glob(filepath.Join(kept, "*.deb"))
	if err != nil || len(paths) != len(names) {
		t.Fatalf("%s has %q, want %q", kept, paths, names)
	}
	return paths
}

// downloadDebs has the host's apt, which knows how to get there, fetch packages of the
// guest's release.
func downloadDebs(t testing.TB, dir string, names []string) {
	t.Helper()
	apt := t.TempDir()
	write(t, filepath.Join(apt, "sources.list"),
		"deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "+imagemgr.PublicMain+" bookworm main\n")
	write(t, filepath.Join(apt, "status"), "")
	for _, sub := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(apt, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	get := []string{"env", "-C", dir, "apt-get", "-qq"}
	for _, option := range []string{
		"Dir::Etc::SourceList=" + apt + "/sources.list", "Dir::Etc::SourceParts=/dev/null",
		"Dir::State::Lists=" + apt + "/lists", "Dir::State::Status=" + apt + "/status", "Dir::Cache=" + apt + "/cache",
		"APT::Architecture=amd64", "APT::Sandbox::User=root", "APT::Update::Error-Mode=any",
		"Acquire::Languages=none", "Acquire::Retries=3",
	} {
		get = append(get, "-o", option)
	}
	output(t, append(get, "update")...)
	output(t, append(append(get, "download"), names...)...)
}
