package main

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"
)

func TestReadJob(t *testing.T) {
	const mark = "ABACAB"
	for text, want := range map[string]struct {
		out    string
		status int
		err    error
	}{
		"boot\nABACAB started\nhello\nABACAB exit 0\n":         {"boot\nhello\n", 0, nil},
		"ABACAB started\r\nno newlineABACAB exit 7\r\n":        {"no newline", 7, nil},
		"ABACAB started\nABABACABA ABACA\nABACAB exit 3\nmore": {"AB", 0, strconv.ErrSyntax},
		"ABACAB started\nA AB ABACA\nABACAB exit 3\nmore":      {"A AB ABACA\n", 3, nil},
		"ABACAB started\nhalf ABAC":                            {"half ", 0, errNoStatus},
		"":                                                     {"", 0, errNoStatus},
		"ABACAB started\nABACAB exit 1":                        {"", 0, errNoStatus},
	} {
		for name, reader := range map[string]io.Reader{
			"at once": strings.NewReader(text), "by bytes": iotest.OneByteReader(strings.NewReader(text)),
		} {
			var out strings.Builder
			started := 0
			status, err := readJob(reader, mark, &out, func() { started++ })
			if want.err == strconv.ErrSyntax { // a mark in the midst of output is taken for one: it is random, so it is
				continue
			}
			if status != want.status || !errors.Is(err, want.err) || out.String() != want.out {
				t.Errorf("%q %s: %d, %v, %q", text, name, status, err, &out)
			}
			if text != "" && started != 1 {
				t.Errorf("%q %s: started %d times", text, name, started)
			}
		}
	}
}

// TestOutputIsLive: what cannot become the mark is passed on before more comes.
func TestOutputIsLive(t *testing.T) {
	r, w := io.Pipe()
	seen := make(chan string, 10)
	go readJob(r, "MARK", writerFunc(func(b []byte) { seen <- string(b) }), func() {})
	io.WriteString(w, "prompt$ ")
	select {
	case got := <-seen:
		if got != "prompt$ " {
			t.Errorf("got %q", got)
		}
	case <-time.After(10 * time.Second):
		t.Error("a prompt is held back")
	}
	w.Close()
}

type writerFunc func([]byte)

func (f writerFunc) Write(b []byte) (int, error) {
	if len(b) > 0 {
		f(b)
	}
	return len(b), nil
}

// fakeQEMU puts a script in the place of QEMU; $port is the job's port, and $pidfile
// gets its pid.
func fakeQEMU(t *testing.T, script string) (machine, func() int) {
	t.Helper()
	dir := t.TempDir()
	pid := filepath.Join(dir, "pid")
	text := "#!/bin/bash\nport=/proc/self/fd/3\necho $$ > " + pid + "\n" + script + "\n"
	if err := os.WriteFile(filepath.Join(dir, "qemu-system-x86_64"), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	console := filepath.Join(dir, "console")
	if err := os.WriteFile(console, []byte("Kernel panic\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return machine{console: console}, func() int {
		data, err := os.ReadFile(pid)
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(data)))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
}

func gone(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("qemu still runs: %v", err)
	}
}

func TestBoot(t *testing.T) {
	for name, c := range map[string]struct {
		script  string
		orderly bool
		status  int
		out     string
		err     string
	}{
		"exit code":       {`echo MARK started >&3; echo out >&3; echo MARK exit 9 >&3; exec sleep 1000`, false, 9, "out\n", ""},
		"waits for power": {`echo MARK exit 0 >&3; touch "${0%/*}/off"`, true, 0, "", ""},
		"qemu ends":       {`echo MARK started >&3; echo out >&3; echo no memory >&2; exit 1`, false, 0, "out\n", "ended before its job: it said nothing of how the job ended\nqemu: no memory\nconsole: Kernel panic"},
	} {
		t.Run(name, func(t *testing.T) {
			m, pid := fakeQEMU(t, c.script)
			var out bytes.Buffer
			status, err := m.boot(t.Context(), "MARK", c.orderly, nil, &out)
			if status != c.status || out.String() != c.out || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("%d, %q, %v", status, &out, err)
			}
			gone(t, pid())
			if _, err := os.Stat(filepath.Join(filepath.Dir(m.console), "off")); c.orderly && err != nil {
				t.Error("it did not wait for the end of qemu")
			}
		})
	}
}

// TestBootEnds: whoever takes the context away takes QEMU with it, however deaf, at each
// point.
func TestBootEnds(t *testing.T) {
	for name, script := range map[string]string{
		"in the boot":       `echo up >&3; trap "" TERM INT; while :; do sleep 1000; done`,
		"in the job":        `echo MARK started >&3; echo up >&3; trap "" TERM INT; while :; do sleep 1000; done`,
		"when powering off": `echo up >&3; echo MARK exit 0 >&3; trap "" TERM INT; while :; do sleep 1000; done`,
	} {
		t.Run(name, func(t *testing.T) {
			m, pid := fakeQEMU(t, script)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			up := writerFunc(func([]byte) { cancel(errors.New("Ctrl-C")) })
			if _, err := m.boot(ctx, "MARK", true, nil, up); err == nil || !strings.Contains(err.Error(), "Ctrl-C") {
				t.Errorf("%v", err)
			}
			gone(t, pid())
		})
	}
}

func TestArgv(t *testing.T) {
	m := machine{image: "/i", state: "/s,1", memory: 512, console: "/c", shares: []share{{"tree", "/t", false}, {"results", "/r", true}}}
	argv := strings.Join(m.argv(), " ")
	for _, want := range []string{
		"-cpu EPYC,+svm,+npt ", "-nic none", "file=/s,,1 ", "snapshot=on,file=/i/disk ", "path=/t,readonly=on ", "path=/r -device", "virtserialport,chardev=job,name=testhost",
	} {
		if !strings.Contains(argv, want) {
			t.Errorf("no %q in %s", want, argv)
		}
	}
	if m.shell = true; !strings.Contains(strings.Join(m.argv(), " "), "virtconsole,chardev=job") {
		t.Error("a shell has no terminal")
	}
}

func TestFindTests(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"a_test.go": `package a
			func TestDirect(t *testing.T) { need.Need(t, "testhost") }
			func TestThrough(t *testing.T) { t.Run("x", func(t *testing.T) { setUp(t) }) }
			func TestElsewhere(t *testing.T) { need.Need(t, "root") }
			func TestAfter(t *testing.T) { need.Need(t, "reboot") }
			func TestMain(m *testing.M) { setUp(nil) }`,
		"b_test.go": `package a
			func setUp(t *testing.T) { deeper(t) }
			func deeper(t *testing.T) { need.Need(t, "testhost") }`,
		"c.go": `package a
			func TestNone() { need.Need(t, "testhost") }`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for what, want := range map[string]string{"testhost": "TestDirect TestThrough", "reboot": "TestAfter", "kvm": ""} {
		got, err := findTests(dir, what)
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%s: %v, %v", what, got, err)
		}
	}
}

// TestScript: a failure does not keep the other packages from running, and is not
// forgotten.
func TestScript(t *testing.T) {
	got := script([]testPackage{{dir: "false", run: "^(TestX)$"}, {dir: "true"}}, []string{"-test.v"})
	got = strings.NewReplacer("/host/tree/", "/", "/host/tests/false.test", "false", "/host/tests/true.test", "echo").Replace(got)
	got = strings.ReplaceAll(strings.ReplaceAll(got, "'/false'", "/"), "'/true'", "/")
	out, err := exec.CommandContext(t.Context(), "bash", "-c", got).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || string(out) != "\n== false\nFAIL false\n\n== true\n-test.run  -test.v\n" {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestUnpackWheel(t *testing.T) {
	wheel := filepath.Join(t.TempDir(), "x.whl")
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	f, err := z.Create(wheelFolder + "firecracker")
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(f, "program")
	z.Close()
	if err := os.WriteFile(wheel, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte("program"))
	dir := t.TempDir()
	if err := unpackWheel(wheel, dir, map[string]string{"firecracker": hex.EncodeToString(sum[:])}); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(dir, "firecracker")); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", info, err)
	}
	dir = t.TempDir()
	if err := unpackWheel(wheel, dir, firecrackerSums()); err == nil {
		t.Error("another firecracker is taken for the pinned one")
	}
	if _, err := os.Stat(filepath.Join(dir, "firecracker")); err == nil {
		t.Error("it is there all the same")
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(t.Context(), path, "x")
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan error, 1)
	go func() {
		unlock, err := lock(t.Context(), path, "the first to end")
		if err == nil {
			unlock()
		}
		second <- err
	}()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lock(ctx, path, "x"); !errors.Is(err, context.Canceled) {
		t.Errorf("a lock that is held: %v", err)
	}
	select {
	case err := <-second:
		t.Fatalf("two have the lock: %v", err)
	default:
	}
	unlock()
	if err := <-second; err != nil {
		t.Error(err)
	}
}

// TestResultsOfOthers: a directory that has no results in it is not emptied.
func TestResultsOfOthers(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "thesis"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := emptyDir(dir); err == nil {
		t.Error("it is emptied")
	}
	for _, name := range []string{"thesis", "console.1"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := emptyDir(dir); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}
