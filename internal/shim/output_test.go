package shim

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"banger/test/need"
)

func TestConsoleIsBounded(t *testing.T) {
	dir := t.TempDir()
	const lines = 100_000 // 4 MB
	awaitDone(t, launchVM(t, dir, vmm(t, "spam", fmt.Sprint(lines), "banger-intent: poweroff\n")))

	var whole bytes.Buffer
	for i := range lines {
		whole.WriteString(spamLine(i))
	}
	whole.WriteString("banger-intent: poweroff\n")
	old, err := os.ReadFile(filepath.Join(dir, consoleOld))
	if err != nil {
		t.Fatal(err)
	}
	now, err := os.ReadFile(filepath.Join(dir, consoleFile))
	if err != nil {
		t.Fatal(err)
	}
	if len(old) != consoleLimit || len(now) == 0 || len(now) > consoleLimit {
		t.Errorf("the files have %d and %d bytes", len(old), len(now))
	}
	if !bytes.HasSuffix(whole.Bytes(), append(old, now...)) {
		t.Error("the files are not the end of what was written")
	}
	e := mustReadExit(t, dir)
	if e.Intent != "poweroff" || len(e.Console) != exitLines || e.Console[exitLines-2]+"\n" != spamLine(lines-1) {
		t.Errorf("exit.json has %+v", e)
	}
}

func TestStderrKeepsBothEnds(t *testing.T) {
	dir := t.TempDir()
	const lines = 5_000
	awaitDone(t, launchVM(t, dir, vmm(t, "moan", fmt.Sprint(lines))))
	data, err := os.ReadFile(filepath.Join(dir, stderrFile))
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Builder{}
	for i := range lines {
		all.WriteString(spamLine(i))
	}
	whole := all.String()
	head, rest := string(data[:stderrHead]), string(data[stderrHead:])
	end := whole[len(whole)-stderrTail:]
	left := fmt.Sprintf("\n[%d bytes left out]\n", len(whole)-stderrHead-stderrTail)
	if head != whole[:stderrHead] || rest != left+end {
		t.Errorf("vmm.stderr has %d bytes: %.80q … %.80q", len(data), head, rest)
	}
	if e := mustReadExit(t, dir); e.Stderr != whole[len(whole)-exitStderr:] {
		t.Errorf("exit.json has %.80q", e.Stderr)
	}
}

// Output that fits is whole, at every length around the bounds.
func TestStderrLengths(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.Mkdir("log", 0o700); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 1, stderrHead - 1, stderrHead, stderrHead + 1, stderrHead + stderrTail} {
		s := newStderrLog(stderrFile)
		text := strings.Repeat("abcdefghij", n/10+1)[:n]
		for p := []byte(text); len(p) > 0; p = p[min(len(p), 1000):] {
			s.put(p[:min(len(p), 1000)])
		}
		last := s.finish()
		data, err := os.ReadFile(stderrFile)
		if err != nil || string(data) != text || !strings.HasSuffix(text, last) {
			t.Errorf("of %d bytes %d are kept, %v", n, len(data), err)
		}
	}
}

// smallDisk mounts a file system of 128 KiB on dir.
func smallDisk(t *testing.T, dir string) {
	t.Helper()
	need.Need(t, "root")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=128k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
}

func fill(t *testing.T, path string) {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for err == nil {
		_, err = file.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
}

// A full disk stops no VMM: its output is drained, and the shim ends as ever.
func TestFullDiskDuringTheRun(t *testing.T) {
	dir := t.TempDir()
	smallDisk(t, filepath.Join(dir, "log"))
	awaitDone(t, launchVM(t, dir, vmm(t, "spam", "100000", "banger-intent: reboot\n")))
	if held(t, dir) {
		t.Error("the lock is held")
	}
	if _, err := ReadExit(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("exit.json on a full disk: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "log/*.new")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
	if info, err := os.Stat(filepath.Join(dir, consoleFile)); err != nil || info.Size() == 0 || info.Size() > 128<<10 {
		t.Errorf("console: %v, %v", info, err)
	}
}

// When there is room again, the log goes on, and the end is known also of what was
// dropped.
func TestFullDiskThatIsFreed(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	smallDisk(t, log)
	fill(t, filepath.Join(log, "ballast"))
	// The end of "obey" tells nothing: the words come before it, on a full disk.
	s := launchVM(t, dir, vmm(t, "obey"))
	eventually(t, "the VMM has spoken", func() bool {
		_, err := os.Stat(filepath.Join(dir, "ready"))
		return err == nil
	})
	if err := os.Remove(filepath.Join(log, "ballast")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(s.Shim.PID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	awaitDone(t, s)
	if e := mustReadExit(t, dir); e.Code != 7 || !slices.Equal(e.Console, []string{"ready"}) {
		t.Errorf("exit.json has %+v", e)
	}
}

// A VM whose supervision cannot be written down does not start, and leaves nothing.
func TestFullDiskAtTheStart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "vm")
	smallDisk(t, dir)
	fill(t, filepath.Join(dir, "ballast"))
	_, err := Launch(t.Context(), dir, program(), sleeper(), nil)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("error %v", err)
	}
	if held(t, dir) {
		t.Error("the lock is held")
	}
	if left := inDir(t, dir); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
	if err := os.Remove(filepath.Join(dir, "ballast")); err != nil {
		t.Fatal(err)
	}
	s := launchVM(t, dir, sleeper())
	if err := syscall.Kill(s.VMM.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitDone(t, s)
}

func TestRotation(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.Mkdir("log", 0o700); err != nil {
		t.Fatal(err)
	}
	var whole []byte
	c := newConsole(100)
	for i := range 500 {
		p := bytes.Repeat([]byte{byte('a' + i%26)}, i%260)
		c.put(p)
		whole = append(whole, p...)
		old, _ := os.ReadFile(consoleOld)
		now, _ := os.ReadFile(consoleFile)
		if len(now) > 100 || len(old) > 100 || !bytes.HasSuffix(whole, append(old, now...)) {
			t.Fatalf("after %d bytes: %d and %d, or they are not the end", len(whole), len(old), len(now))
		}
		if i == 250 {
			// The next run goes on.
			c.file.close()
			c = newConsole(100)
		}
	}
	// The directory goes away and comes back.
	if err := os.RemoveAll("log"); err != nil {
		t.Fatal(err)
	}
	c.put(bytes.Repeat([]byte("x"), 250))
	if err := os.Mkdir("log", 0o700); err != nil {
		t.Fatal(err)
	}
	c.put([]byte("back"))
	if now, err := os.ReadFile(consoleFile); err != nil || string(now) != "back" {
		t.Errorf("console %q, %v", now, err)
	}
	// What was dropped is known for exit.json all the same.
	if got := c.last(); !strings.HasSuffix(got, "xxxback") {
		t.Errorf("the end is %q", got)
	}
}

func TestLastLines(t *testing.T) {
	for _, c := range []struct {
		name, text string
		lines      []string
		intent     string
	}{
		{"nothing", "", nil, ""},
		{"blank lines", "\n\r\n \n", nil, ""},
		{"plain", "a\nb\n", []string{"a", "b"}, ""},
		{"intent", "a\nbanger-intent: poweroff\n", []string{"a", "banger-intent: poweroff"}, "poweroff"},
		{"the kernel goes on", "banger-intent: halt\n[  9.1] reboot: System halted\n", []string{"banger-intent: halt", "[  9.1] reboot: System halted"}, "halt"},
		{"behind a prompt", "dev login: banger-intent: reboot\r\n", []string{"dev login: banger-intent: reboot"}, "reboot"},
		{"the last one counts", "banger-intent: reboot\nbanger-intent: poweroff\n", []string{"banger-intent: reboot", "banger-intent: poweroff"}, "poweroff"},
		{"unknown verb", "banger-intent: explode\n", []string{"banger-intent: explode"}, ""},
		{"more behind it", "banger-intent: reboot now\n", []string{"banger-intent: reboot now"}, ""},
		{"too long ago", "banger-intent: reboot\n" + strings.Repeat("x\n", exitLines), slices.Repeat([]string{"x"}, exitLines), ""},
		{"escapes", "\x1b[1;31mred\x1b[0m\x1b]0;title\x07 \x1b(B\u009b5m!\x00\x7f\x1b]0;t\x1b\\.\n", []string{"red 5m!."}, ""},
		{"cut escape", "a\x1b[12\nb\x1b", []string{"a", "b"}, ""},
		{"no UTF-8", "a\xff\xfeb\n", []string{"a\uFFFD\uFFFDb"}, ""},
		{"long", strings.Repeat("é", 1000) + "\n", []string{strings.Repeat("é", exitLineBytes/2)}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			lines, intent := lastLines(c.text)
			if !slices.Equal(lines, c.lines) || intent != c.intent {
				t.Errorf("%q, %q; want %q, %q", lines, intent, c.lines, c.intent)
			}
		})
	}
}

func FuzzLastLines(f *testing.F) {
	f.Add("a\x1b[31mb\r\nbanger-intent: reboot\n")
	f.Fuzz(func(t *testing.T, text string) {
		lines, intent := lastLines(text)
		if len(lines) > exitLines {
			t.Fatalf("%d lines", len(lines))
		}
		for _, line := range lines {
			if len(line) > exitLineBytes+utf8.UTFMax || !utf8.ValidString(line) || strings.ContainsAny(line, "\x1b\r\n\x00\u009b") {
				t.Fatalf("line %q", line)
			}
		}
		if intent != "" && !strings.Contains(text, intent) {
			t.Fatalf("intent %q", intent)
		}
	})
}
