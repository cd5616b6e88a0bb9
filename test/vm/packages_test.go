package vm

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/cgi"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/test/need"
)

// TestPackages: what brings source code and packages to people works in a guest with the
// network that is the default: apt-get, git, go, npm and pip, against servers of the test
// in a world without a way out. Nobody but these servers is asked. The tools come into the
// guest by apt-get, too: some 150 MB.
func TestPackages(t *testing.T) {
	s := newRegistries(t)
	h := newHost(t)
	h.via = s.w.host.enter()
	n := networked{t, h, s.w}
	h.ok("create", "--memory", "1G", "--name", "dev")
	for _, step := range []struct {
		name string
		f    func(n networked, s *registries)
	}{
		{"apt-get", testAptGet},
		{"git", testGitClone},
		{"go", testGoModDownload},
		{"npm", testNpmCi},
		{"pip", testPip},
		{"asked", testNobodyElseAsked},
		{"git without a network", testGitRefused},
	} {
		begun := time.Now()
		n.step(step.name, func(n networked) { step.f(n, s) })
		t.Logf("%s: %.1f s", step.name, time.Since(begun).Seconds())
	}
	if t.Failed() { // the log and the console are in what the host dumps
		t.Logf("asked for:\n%s", strings.Join(s.asked(), "\n"))
	}
}

// inside runs a script as the guest's own user, in an empty directory; it stops at the
// first command that fails.
func (n networked) inside(files map[string]string, script string) string {
	n.Helper()
	var s strings.Builder
	s.WriteString("set -euo pipefail; cd $(mktemp -d)\n")
	for name, text := range files {
		fmt.Fprintf(&s, "cat > %s <<'END'\n%s\nEND\n", name, text)
	}
	s.WriteString(script)
	return n.h.ok("exec", "dev", "bash", "-c", s.String())
}

// install has apt-get bring packages of the test's repository into the guest.
func (n networked) install(names ...string) {
	n.Helper()
	begun := time.Now()
	n.guest("dev", "set -e; export DEBIAN_FRONTEND=noninteractive; apt-get update -qq; "+
		"apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-unsafe-io "+strings.Join(names, " "))
	n.Logf("apt-get install: %.1f s", time.Since(begun).Seconds())
}

// wantEnd wants what a command printed to end with a text.
func (n networked) wantEnd(what, out, want string) {
	n.Helper()
	if !strings.HasSuffix(out, want) {
		n.Errorf("%s: %q, want it to end with %q", what, out, want)
	}
}

const greeting = "hello from a package of the test"

// testAptGet: a package that needs another one.
func testAptGet(n networked, s *registries) {
	hello, words := newDeb(n, "banger-hello", "banger-words"), newDeb(n, "banger-words")
	hello.write("usr/bin/banger-hello", 0o755, "#!/bin/sh\nexec cat /usr/share/banger-words\n")
	words.write("usr/share/banger-words", 0o644, greeting+"\n")
	s.addDebs(hello, words)
	// Nothing but the test's repository.
	n.guest("dev", "rm -f /etc/apt/sources.list.d/*; echo 'deb [trusted=yes] http://apt.test/ ./' > /etc/apt/sources.list")
	n.install("banger-hello")
	n.wantEnd("banger-hello", n.inside(nil, "banger-hello"), greeting+"\n")
	s.wantAsked(n, "apt.test GET /Packages", "apt.test GET /banger-words.deb")
}

// testGitClone: some megabytes by smart HTTP.
func testGitClone(n networked, s *registries) {
	out := n.inside(nil, "git clone -q http://git.test/repo.git; cd repo; git rev-parse HEAD; sha256sum < data; git status --porcelain; git fsck --strict; git ls-remote http://"+namelessAddress+"/repo.git HEAD")
	if want := s.head + "\n" + n.w.sum() + "  -\n" + s.head + "\tHEAD\n"; out != want {
		n.Errorf("the clone: %q, want %q", out, want)
	}
	s.wantAsked(n, "git.test POST /repo.git/git-upload-pack")
}

// testGoModDownload: the host's own Go; for modules it needs no more than its command.
func testGoModDownload(n networked, s *registries) {
	root := output(n, "go", "env", "GOROOT")
	d := newDeb(n, "banger-go")
	for _, name := range []string{"bin/go", "go.env", "VERSION"} {
		d.copy(filepath.Join(root, name), "opt/go/"+name)
	}
	s.addDebs(d)
	n.install(d.name)
	out := n.inside(map[string]string{"go.mod": "module test.test/main\n\ngo 1.21\n\nrequire greeting.test/go v1.0.0\n"},
		`export GOROOT=/opt/go GOTOOLCHAIN=local GOSUMDB=off GOFLAGS=-mod=mod GOPROXY=http://go.test
		/opt/go/bin/go mod download all
		grep -c 'greeting.test/go v1.0.0 h1:' go.sum
		cat "$(/opt/go/bin/go env GOMODCACHE)/greeting.test/go@v1.0.0/greeting.txt"`)
	n.wantEnd("go mod download", out, "1\n"+greeting+"\n")
	s.wantAsked(n, "go.test GET /greeting.test/go/@v/v1.0.0.mod", "go.test GET /greeting.test/go/@v/v1.0.0.zip")
}

// testNpmCi: the host's own node and npm, and a lock file with the sum of the package.
func testNpmCi(n networked, s *registries) {
	need.Need(n, "node")
	npm, err := exec.LookPath("npm")
	if err == nil {
		npm, err = filepath.EvalSymlinks(npm)
	}
	if err != nil {
		n.Fatal(err)
	}
	d := newDeb(n, "banger-node")
	d.copy(output(n, "node", "-p", "process.execPath"), "opt/node/bin/node")
	d.copy(filepath.Join(filepath.Dir(npm), ".."), "opt/node/npm")
	d.pack("opt/node")
	s.addDebs(d)
	n.install(d.name)
	lock := map[string]any{
		"name": "main", "version": "1.0.0", "lockfileVersion": 3, "requires": true,
		"packages": map[string]any{
			"": map[string]any{"name": "main", "version": "1.0.0", "dependencies": map[string]string{"greeting": "^1.0.0"}},
			"node_modules/greeting": map[string]string{
				"version": "1.0.0", "resolved": "http://npm.test/greeting/-/greeting-1.0.0.tgz", "integrity": s.npmIntegrity,
			},
		},
	}
	text, err := json.Marshal(lock)
	if err != nil {
		n.Fatal(err)
	}
	out := n.inside(map[string]string{
		"package.json":      `{"name": "main", "version": "1.0.0", "dependencies": {"greeting": "^1.0.0"}}`,
		"package-lock.json": string(text),
	}, `mkdir ~/node; tar -xf /opt/node.tar -C ~/node; export PATH=~/node/bin:$PATH
		node ~/node/npm/bin/npm-cli.js ci --fetch-retries 0 --no-audit --no-fund --no-update-notifier --registry http://npm.test/ >&2
		node -p 'require("greeting")'`)
	n.wantEnd("npm ci", out, greeting+"\n")
	s.wantAsked(n, "npm.test GET /greeting/-/greeting-1.0.0.tgz")
}

// testPip: Debian's Python and pip, without what compiles all of it at installation.
func testPip(n networked, s *registries) {
	d := newDeb(n, "banger-python")
	if err := os.Mkdir(filepath.Join(d.dir, "opt"), 0o755); err != nil {
		n.Fatal(err)
	}
	for _, path := range pythonDebs(n) {
		output(n, "dpkg-deb", "--extract", path, filepath.Join(d.dir, "opt/python"))
	}
	d.pack("opt/python")
	s.addDebs(d)
	n.install(d.name)
	out := n.inside(nil, `mkdir ~/python; tar -xf /opt/python.tar -C ~/python; export PATH=~/python/usr/bin:$PATH
		python3.11 $(echo ~/python/usr/share/python-wheels/pip-*.whl)/pip install -q --retries 0 --no-compile --disable-pip-version-check \
			--no-cache-dir --target here --index-url http://pypi.test/simple/ --trusted-host pypi.test greeting==1.0.0 >&2
		cd here; python3.11 -c 'import greeting; print(greeting.text)'`)
	n.wantEnd("pip install", out, greeting+"\n")
	s.wantAsked(n, "pypi.test GET /simple/greeting/", "pypi.test GET /files/greeting-1.0.0-py3-none-any.whl")
}

// testNobodyElseAsked: no name but the servers' own was looked up, and nothing refused.
func testNobodyElseAsked(n networked, s *registries) {
	names := s.names()
	if len(names) == 0 {
		n.Error("nobody asked the resolver for anything")
	}
	for _, name := range names {
		if !strings.HasSuffix(name, ".test.") {
			n.Errorf("somebody asked the resolver for %s", name)
		}
	}
	if log := n.h.ok("logs", "dev", "--network"); strings.Contains(log, "refused") {
		n.Errorf("something was refused:\n%s", log)
	}
}

// testGitRefused: without a network the same clone fails at once and in words, by name and
// by address, until the network is back.
func testGitRefused(n networked, s *registries) {
	n.h.ok("set", "dev", "--network", "none")
	before := len(s.asked())
	for _, at := range []string{"git.test", namelessAddress} {
		// timeout ends with 124 where git hangs.
		out := n.inside(nil, "timeout 60 git clone -q http://"+at+"/repo.git 2>said && echo cloned || echo failed $?; cat said")
		if !strings.HasPrefix(out, "failed 128\n") {
			n.Errorf("git clone from %s without a network: %q", at, out)
		}
	}
	n.wantLog("dev", []string{"refused dns git.test", "hint: banger set dev --allow git.test\n"},
		[]string{"refused tcp " + namelessAddress + ":80", "hint: banger set dev --allow " + namelessAddress + ":80\n"})
	if now := s.asked(); len(now) != before {
		n.Errorf("a server was asked all the same: %q", now[before:])
	}
	n.h.ok("set", "dev", "--network", "internet")
	n.wantEnd("git ls-remote with a network again", n.inside(nil, "git ls-remote http://git.test/repo.git HEAD"), s.head+"\tHEAD\n")
}

// output is what a command of the host prints, without the last line's end.
func output(t testing.TB, argv ...string) string {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// serveGit makes a repository of some megabytes, and serves it by git's own program.
func (s *registries) serveGit() http.Handler {
	t, root := s.t, s.t.TempDir()
	tree, bare := filepath.Join(root, "tree"), filepath.Join(root, "repo.git")
	git(t, root, "init", "-q", "-b", "main", tree)
	if err := os.WriteFile(filepath.Join(tree, "data"), s.w.data, 0o644); err != nil {
		t.Fatal(err)
	}
	for i := range 200 { // small ones make deltas
		write(t, filepath.Join(tree, fmt.Sprintf("file%d", i)), strings.Repeat(fmt.Sprintln("a line of", i%7), 100+i))
	}
	git(t, tree, "add", ".")
	git(t, tree, "commit", "-q", "-m", "all")
	git(t, root, "clone", "-q", "--bare", tree, bare)
	s.head = strings.TrimSpace(git(t, bare, "rev-parse", "HEAD"))
	return &cgi.Handler{
		Path: filepath.Join(output(t, "git", "--exec-path"), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + root, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1"},
	}
}
