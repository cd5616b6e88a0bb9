package shim

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The test binary plays the daemon, the VMM and the network too: roleEnv says which.
const (
	roleEnv  = "BANGER_SHIM_TEST_ROLE"
	programs = "BANGER_SHIM_TEST_PROGRAM"
	holdArg  = "hold-then-exec:"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && strings.HasPrefix(os.Args[1], holdArg) {
		playHeldShim(strings.TrimPrefix(os.Args[1], holdArg))
	}
	switch os.Getenv(roleEnv) {
	case "":
		os.Exit(runTests(m))
	case "daemon":
		playDaemon(os.Args[1], os.Args[2:])
	case "placing daemon":
		playPlacingDaemon(os.Args[1], os.Args[2])
	case "vmm":
		syscall.Exit(playVMM(os.Args[1:]))
	case "net":
		syscall.Exit(playNetwork(os.Args[1]))
	}
}

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "shim")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "banger-shim")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "banger/cmd/banger-shim")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "cannot build banger-shim: %v\n%s", err, out)
		return 1
	}
	os.Setenv(programs, program)
	return m.Run()
}

// playDaemon launches a VM, says so, and stays. Orphans come to it, and it never
// reaps them.
func playDaemon(dir string, argv []string) {
	const setChildSubreaper = 36 // PR_SET_CHILD_SUBREAPER
	syscall.Syscall(syscall.SYS_PRCTL, setChildSubreaper, 1, 0)
	fmt.Println("launching")
	started, err := Launch(context.Background(), dir, os.Getenv(programs), Config{Argv: argv}, nil)
	if err != nil {
		fmt.Println("failed", err)
		syscall.Exit(1)
	}
	fmt.Println("launched", started.Shim.PID, started.VMM.PID)
	select {}
}

// heldShim is a program that becomes the shim once there is a file DIR/go.
func heldShim(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(t.TempDir(), "held-shim")
	if err := os.WriteFile(script, []byte("#!"+self+" "+holdArg+program()+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return script
}

func playHeldShim(program string) {
	for range 20_000 {
		if _, err := os.Stat("go"); err == nil {
			panic(syscall.Exec(program, []string{"banger-shim"}, []string{"GOMAXPROCS=1"}))
		}
		time.Sleep(time.Millisecond)
	}
	syscall.Exit(1)
}

func playVMM(args []string) int {
	switch args[0] {
	case "exit": // CODE STDOUT STDERR
		os.Stdout.WriteString(args[2])
		os.Stderr.WriteString(args[3])
		code, _ := strconv.Atoi(args[1])
		return code
	case "spam": // LINES, then LAST
		n, _ := strconv.Atoi(args[1])
		for i := range n {
			if _, err := os.Stdout.WriteString(spamLine(i)); err != nil {
				return 9
			}
		}
		os.Stdout.WriteString(args[2])
	case "moan": // LINES to stderr
		n, _ := strconv.Atoi(args[1])
		for i := range n {
			os.Stderr.WriteString(spamLine(i))
		}
	case "obey": // SIGTERM ends it with 7
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		os.Stdout.WriteString("ready\n")
		// For those who cannot see the console.
		if err := os.WriteFile("ready", nil, 0o600); err != nil {
			return 9
		}
		<-c
		return 7
	case "daemonise", "orphans", "touch":
		return playGroupVMM(args)
	case "deaf": // SIGTERM makes a file "heard"
		hear("heard")
	}
	return 0
}

// hear runs for ever and makes a file of each SIGTERM.
func hear(file string) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	os.Stdout.WriteString("ready\n")
	for range c {
		_ = os.WriteFile(file, nil, 0o600)
	}
}

func spamLine(i int) string { return fmt.Sprintf("line %07d of what a guest may write\n", i) }

// vmm makes the command of the VMM that the test binary plays.
func vmm(t *testing.T, args ...string) Config {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Config{Argv: append([]string{self}, args...), Env: []string{roleEnv + "=vmm", "GORACE=atexit_sleep_ms=0"}}
}

// sleeper is a VMM that runs until it is killed.
func sleeper() Config { return Config{Argv: []string{"sleep", "1000"}} }

func program() string { return os.Getenv(programs) }

func launchVM(t *testing.T, dir string, cfg Config) Supervised {
	t.Helper()
	var place Place
	if cfg.Group != "" {
		place = placeIn(cfg.Group)
	}
	s, err := Launch(t.Context(), dir, program(), cfg, place)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(s.Shim.PID, syscall.SIGKILL)
		awaitDone(t, s)
	})
	return s
}

// awaitDone waits until the shim has ended and was reaped.
func awaitDone(t *testing.T, s Supervised) {
	t.Helper()
	eventually(t, "the shim has ended", func() bool { return state(s.Shim.PID) == "" })
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

func held(t *testing.T, dir string) bool {
	t.Helper()
	h, err := Held(dir)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// state is the state letter of a process, "" when there is none.
func state(pid int) string {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return ""
	}
	s := string(data)
	return strings.Fields(s[strings.LastIndexByte(s, ')')+1:])[0]
}

// lives is false for zombies.
func lives(pid int) bool {
	s := state(pid)
	return s != "" && s != "Z" && s != "X"
}

// inDir lists the processes whose working directory is dir: shims and VMMs.
func inDir(t *testing.T, dir string) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if cwd, err := os.Readlink("/proc/" + e.Name() + "/cwd"); err == nil && cwd == dir {
			found = append(found, pid)
		}
	}
	return found
}

// daemon is a process that has launched, or is about to launch, the VM of dir.
type daemon struct {
	cmd *exec.Cmd
	out *lineReader
}

func startDaemon(t *testing.T, program, dir string, argv ...string) *daemon {
	t.Helper()
	cmd := exec.Command(os.Args[0], append([]string{dir}, argv...)...)
	cmd.Env = append(os.Environ(), roleEnv+"=daemon", programs+"="+program)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d := &daemon{cmd: cmd, out: &lineReader{r: out}}
	t.Cleanup(d.kill)
	if got := d.out.next(t); got != "launching" {
		t.Fatalf("the daemon says %q", got)
	}
	return d
}

// launched waits until the VM runs.
func (d *daemon) launched(t *testing.T) (shim, vmm int) {
	t.Helper()
	line := d.out.next(t)
	if _, err := fmt.Sscanf(line, "launched %d %d", &shim, &vmm); err != nil {
		t.Fatalf("the daemon says %q", line)
	}
	return shim, vmm
}

func (d *daemon) kill() {
	if d.cmd.ProcessState == nil {
		_ = d.cmd.Process.Kill()
		_ = d.cmd.Wait()
	}
}

type lineReader struct {
	r    io.Reader
	rest []byte
}

func (l *lineReader) next(t *testing.T) string {
	t.Helper()
	for {
		if line, rest, ok := bytes.Cut(l.rest, []byte("\n")); ok {
			l.rest = rest
			return string(line)
		}
		buf := make([]byte, 4096)
		n, err := l.r.Read(buf)
		if err != nil {
			t.Fatalf("reading from the daemon: %v", err)
		}
		l.rest = append(l.rest, buf[:n]...)
	}
}

func mustReadExit(t *testing.T, dir string) Exit {
	t.Helper()
	e, err := ReadExit(dir)
	if err != nil {
		t.Fatal(err)
	}
	return e
}
