package hostcmd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// The test binary plays the commands too.
const roleEnv = "BANGER_HOSTCMD_TEST_ROLE"

func TestMain(m *testing.M) {
	if as := os.Getenv(roleEnv); as != "" {
		syscall.Exit(play(as, os.Args[1:]))
	}
	goleak.VerifyTestMain(m)
}

func play(as string, args []string) int {
	switch as {
	case "env":
		for _, kv := range os.Environ() {
			fmt.Println(kv)
		}
	case "fail": // CODE STDERR
		os.Stderr.WriteString(args[1])
		code, _ := strconv.Atoi(args[0])
		return code
	case "spam": // BYTES
		n, _ := strconv.Atoi(args[0])
		chunk := bytes.Repeat([]byte("0123456789abcdef"), 4096)
		for n > 0 {
			m, err := os.Stdout.Write(chunk[:min(n, len(chunk))])
			if err != nil {
				return 3
			}
			n -= m
		}
	case "family": // FILE [ignore]: a child that stays; TERM is noted in FILE by the child
		return family(args[0], len(args) > 1)
	case "child":
		return familyChild(args[0])
	case "stray": // leaves a process of another session behind that keeps stdout
		cmd := exec.Command("sleep", "1000")
		cmd.Stdout = os.Stdout
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			return 1
		}
		fmt.Println(cmd.Process.Pid)
	case "leave": // leaves a process of its group behind that keeps stdout and ignores SIGTERM
		signal.Ignore(syscall.SIGTERM)
		cmd := exec.Command("sleep", "1000")
		cmd.Stdout = os.Stdout
		if err := cmd.Start(); err != nil {
			return 1
		}
		fmt.Println(cmd.Process.Pid)
	case "closer": // keeps nothing of what it was given
		syscall.Close(3) // the leash
		fmt.Println("ready", os.Getpid(), os.Getpid())
		time.Sleep(time.Minute)
	case "daemon": // ROLE …: runs it and stays
		p, err := Start(context.Background(), role(args[0], args[1:]...))
		if err != nil {
			fmt.Println(err)
			return 1
		}
		io.Copy(os.Stdout, p.Stdout)
	}
	return 0
}

// family is like mmdebstrap: itself it ignores SIGTERM and waits for its child,
// which cleans up on it.
func family(file string, stubborn bool) int {
	signal.Ignore(syscall.SIGTERM)

	cmd := exec.Command(os.Args[0], file)
	if stubborn {
		cmd = exec.Command("sleep", "1000") // inherits the ignored SIGTERM
	}
	cmd.Env = append(os.Environ(), roleEnv+"=child")
	cmd.Stdout = os.Stdout
	if err := cmd.Start(); err != nil {
		return 1
	}
	if stubborn {
		fmt.Println("ready", os.Getpid(), cmd.Process.Pid)
	}
	_ = cmd.Wait()
	return 5
}

func familyChild(file string) int {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	fmt.Println("ready", os.Getppid(), os.Getpid())
	select {
	case <-c:
	case <-time.After(30 * time.Second):
		return 1
	}
	if err := os.WriteFile(file, []byte("cleaned up"), 0o600); err != nil {
		return 1
	}
	return 0
}

// roleEnviron leaves out the second that a binary with the race detector sleeps at
// its end.
func roleEnviron(name string) []string { return Env(roleEnv+"="+name, "GORACE=atexit_sleep_ms=0") }

// role makes the command that the test binary plays.
func role(name string, args ...string) Command {
	return Command{Argv: append([]string{os.Args[0]}, args...), Env: roleEnviron(name)}
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func lives(pid int) bool {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	s := string(data)
	state := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])[0]
	return state != "Z" && state != "X"
}

func readyLine(t *testing.T, r io.Reader) (leader, child int) {
	t.Helper()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(line, "ready %d %d", &leader, &child); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return leader, child
}

func TestOutputAndInput(t *testing.T) {
	out, err := Run(t.Context(), Command{Argv: []string{"cat"}, Stdin: strings.NewReader("hello")})
	if err != nil || string(out) != "hello" {
		t.Errorf("%q, %v", out, err)
	}
	// Without an input there is the end of it.
	if out, err := Run(t.Context(), Command{Argv: []string{"cat"}}); err != nil || len(out) != 0 {
		t.Errorf("%q, %v", out, err)
	}
	var into bytes.Buffer
	if out, err := Run(t.Context(), Command{Argv: []string{"pwd"}, Dir: "/usr", Stdout: &into}); err != nil || out != nil || into.String() != "/usr\n" {
		t.Errorf("%q, %q, %v", out, &into, err)
	}
	// Files are handed over as they are, and more than a pipe holds passes.
	file, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	c := role("spam", "3000000")
	c.Stdout = file
	if _, err := Run(t.Context(), c); err != nil {
		t.Error(err)
	}
	if info, err := file.Stat(); err != nil || info.Size() != 3_000_000 {
		t.Errorf("%v, %v", info, err)
	}
	if out, err := Run(t.Context(), role("spam", "3000000")); err != nil || len(out) != 3_000_000 {
		t.Errorf("%d bytes, %v", len(out), err)
	}
	// A command need not read its input.
	if _, err := Run(t.Context(), Command{Argv: []string{"true"}, Stdin: bytes.NewReader(make([]byte, 1<<20))}); err != nil {
		t.Error(err)
	}
}

func TestErrors(t *testing.T) {
	git := role("fail", "1", "warning: x\nerror: patch does not apply\n\n")
	long := role("fail", "2", strings.Repeat("x", 100_000))
	for _, c := range []struct {
		name string
		cmd  Command
		code int
		text string // the program's name is replaced by PROG
	}{
		{"last line", git, 1, "PROG: exit status 1: error: patch does not apply"},
		{"silent", Command{Argv: []string{"false"}}, 1, "false: exit status 1"},
		{"escapes", role("fail", "1", "\x1b[31mred\x9b\r\n \r\n"), 1, "PROG: exit status 1: [31mred?"},
		{"long", long, 2, "PROG: exit status 2: " + strings.Repeat("x", 400) + " …"},
		{"signal", Command{Argv: []string{"sh", "-c", "kill -9 $$"}}, -1, "sh: signal: killed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Run(t.Context(), c.cmd)
			var e *Error
			if !errors.As(err, &e) || e.ExitCode != c.code || !slices.Equal(e.Argv, c.cmd.Argv) {
				t.Fatalf("error %#v", err)
			}
			if got := strings.Replace(err.Error(), title(c.cmd.Argv), "PROG", 1); got != c.text && err.Error() != c.text {
				t.Errorf("%q, want %q", got, c.text)
			}
			if len(e.Stderr) > MaxStderr {
				t.Errorf("%d bytes of stderr", len(e.Stderr))
			}
			var exit *exec.ExitError
			if !errors.As(err, &exit) {
				t.Error("no ExitError inside")
			}
		})
	}
	for argv0, text := range map[string]string{
		"no-such-program":  "no-such-program x: no-such-program is not installed",
		"/no/such/program": "program x: cannot execute /no/such/program: no such file or directory",
	} {
		_, err := Run(t.Context(), Command{Argv: []string{argv0, "x"}})
		var e *Error
		if !errors.As(err, &e) || e.ExitCode != -1 {
			t.Errorf("error %#v", err)
		}
		if !errors.Is(err, exec.ErrNotFound) && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", argv0, err)
		}
		if (argv0 == "no-such-program") != errors.Is(err, exec.ErrNotFound) {
			t.Errorf("%s: %v", argv0, err)
		}
		if err.Error() != text {
			t.Errorf("%v, want %s", err, text)
		}
	}
	if _, err := Run(t.Context(), Command{}); err == nil {
		t.Error("no command is no error")
	}
	if _, err := Run(t.Context(), Command{Argv: []string{"true"}, Dir: "/no/such/dir"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

// TestNotInstalled: in words, with the package where it is called otherwise.
func TestNotInstalled(t *testing.T) {
	for program, text := range map[string]string{
		"qemu-system-x86_64": "qemu-system-x86_64 is not installed (package qemu-system-x86)",
		"mkfs.ext4":          "mkfs.ext4 is not installed (package e2fsprogs)",
		"git":                "git is not installed",
	} {
		if err := (&NotInstalledError{Program: program}); err.Error() != text || !errors.Is(err, exec.ErrNotFound) {
			t.Errorf("%v, want %s", err, text)
		}
	}
}

func TestTitle(t *testing.T) {
	for want, argv := range map[string][]string{
		"git apply":       {"/usr/bin/git", "apply", "--check"},
		"git rev-parse":   {"git", "-C", "/x", "-c", "a=b", "--no-pager", "rev-parse", "HEAD"},
		"git":             {"git", "-C"},
		"mkfs.ext4":       {"mkfs.ext4", "-q", "disk"},
		"e2fsck":          {"e2fsck", "/dev/x"},
		"qemu-img create": {"qemu-img", "create", "-f"},
		"command":         nil,
	} {
		if got := title(argv); got != want {
			t.Errorf("%q is called %q, want %q", argv, got, want)
		}
	}
}

func TestEnvironment(t *testing.T) {
	for k, v := range map[string]string{
		"HOME": "/h", "USER": "u", "LOGNAME": "u", "TMPDIR": os.TempDir(), "XDG_CACHE_HOME": "/c", "PATH": "relative:/usr/bin:/opt/x",
		"GIT_DIR": "/evil", "GIT_SSH_COMMAND": "evil", "LD_PRELOAD": "", "LANG": "de_DE.UTF-8", "LC_MESSAGES": "de_DE.UTF-8",
	} {
		t.Setenv(k, v)
	}
	out, err := Run(t.Context(), role("env"))
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Split(strings.TrimSpace(string(out)), "\n")
	got = slices.DeleteFunc(got, func(kv string) bool {
		return strings.HasPrefix(kv, roleEnv) || strings.HasPrefix(kv, "GORACE=") || (strings.HasPrefix(kv, "XDG_") && kv != "XDG_CACHE_HOME=/c")
	})
	slices.Sort(got)
	want := []string{
		"HOME=/h", "LANG=C.UTF-8", "LC_ALL=C.UTF-8", "LOGNAME=u",
		"PATH=/usr/bin:/opt/x:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin:/bin",
		"TMPDIR=" + os.TempDir(), "USER=u", "XDG_CACHE_HOME=/c",
	}
	if !slices.Equal(got, want) {
		t.Errorf("the command sees\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	c := role("env")
	c.Env = []string{roleEnv + "=env", "A=1"}
	if out, err := Run(t.Context(), c); err != nil || string(out) != roleEnv+"=env\nA=1\n" {
		t.Errorf("with Env: %q, %v", out, err)
	}
	// Programs of the system directories are found though PATH lacks them, and those
	// of a relative one are not.
	t.Setenv("PATH", ".")
	t.Chdir(t.TempDir())
	if err := os.WriteFile("planted", []byte("#!/bin/true\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if path, err := LookPath("planted"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("found %s, %v", path, err)
	}
	if path, err := LookPath("true"); err != nil {
		t.Errorf("%s, %v", path, err)
	}
}

func TestCancelledBeforeTheStart(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Run(ctx, Command{Argv: []string{"true"}}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestStreaming(t *testing.T) {
	p, err := Start(t.Context(), Command{Argv: []string{"cat"}})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 5)
	for _, word := range []string{"hello", "again"} {
		if _, err := io.WriteString(p.Stdin, word); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(p.Stdout, buf); err != nil || string(buf) != word {
			t.Fatalf("%q, %v", buf, err)
		}
	}
	p.Stdin.Close()
	if rest, err := io.ReadAll(p.Stdout); err != nil || len(rest) != 0 {
		t.Errorf("%q, %v", rest, err)
	}
	if err := p.Wait(); err != nil {
		t.Error(err)
	}
}

// slow is a reader of the command's output that takes longer than strayGrace.
type slow struct {
	n     int
	delay time.Duration
}

func (s *slow) Write(p []byte) (int, error) {
	if s.n < 64<<10 {
		time.Sleep(s.delay) // is what this type is: not a wait for anything
	}
	s.n += len(p)
	return len(p), nil
}

// What the command wrote is passed on whole, long after it has ended.
func TestSlowReaderLosesNothing(t *testing.T) {
	c := role("spam", "60000") // fits into the pipe, so the command ends at once
	into := &slow{delay: 2 * strayGrace}
	c.Stdout = into
	if _, err := Run(t.Context(), c); err != nil || into.n != 60_000 {
		t.Errorf("%d bytes, %v", into.n, err)
	}
	// The same for a caller who reads himself.
	p, err := Start(t.Context(), role("spam", "60000"))
	if err != nil {
		t.Fatal(err)
	}
	<-p.done
	time.Sleep(strayGrace + strayGrace/2) // as above
	if out, err := io.ReadAll(p.Stdout); err != nil || len(out) != 60_000 {
		t.Errorf("%d bytes, %v", len(out), err)
	}
	if err := p.Wait(); err != nil {
		t.Error(err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }
func (f failing) Read([]byte) (int, error)  { return 0, f.err }

func TestBrokenStreams(t *testing.T) {
	c := role("spam", "100000000")
	c.Stdout = failing{syscall.ENOSPC}
	if _, err := Run(t.Context(), c); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("output: %v", err)
	}
	// Standard error's copy is a courtesy.
	c = role("fail", "0", "words")
	c.Stderr = failing{syscall.ENOSPC}
	if _, err := Run(t.Context(), c); err != nil {
		t.Errorf("stderr: %v", err)
	}
	var words bytes.Buffer
	c.Stderr = &words
	if _, err := Run(t.Context(), c); err != nil || words.String() != "words" {
		t.Errorf("stderr: %q, %v", &words, err)
	}
}

// A part of the input must not pass for the whole, also with a command that takes
// its time to die.
func TestBrokenInput(t *testing.T) {
	t.Parallel()
	cut := io.MultiReader(strings.NewReader("half"), failing{syscall.ECONNRESET})
	c := Command{Argv: []string{"sh", "-c", "trap '' TERM; cat >/dev/null; echo whole"}, Stdin: cut}
	if out, err := Run(t.Context(), c); !errors.Is(err, syscall.ECONNRESET) || len(out) > 0 {
		t.Errorf("%q, %v", out, err)
	}
}

func TestCaptureIsBounded(t *testing.T) {
	out, err := Run(t.Context(), role("spam", strconv.Itoa(MaxCapture+1)))
	if err == nil || !strings.Contains(err.Error(), "more than 64 MiB") || len(out) > MaxCapture {
		t.Errorf("%d bytes, %v", len(out), err)
	}
}

func TestTail(t *testing.T) {
	var whole []byte
	tl := &tail{limit: 100}
	for i := range 300 {
		p := bytes.Repeat([]byte{byte(i)}, i%250)
		whole = append(whole, p...)
		if n, err := tl.Write(p); n != len(p) || err != nil {
			t.Fatal(n, err)
		}
		if got := tl.String(); got != string(whole[max(0, len(whole)-100):]) {
			t.Fatalf("after %d bytes the tail is wrong", len(whole))
		}
	}
}
