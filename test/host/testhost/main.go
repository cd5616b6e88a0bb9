// Testhost runs commands and tests as root in the test host: a stock Debian in QEMU whose
// emulated processor has SVM, with a real /dev/kvm, device-mapper, loop devices, cgroup v2
// and systemd. It builds the host's image once per cache.
//
//	testhost build
//	testhost run  [flags] -- COMMAND [ARG…]
//	testhost test [flags] [PACKAGE…] [-- -test.FLAG…]
//	testhost shell [flags]
//
// The exit code is that of the command; 125 says that the test host itself failed.
// Ctrl-C, a timeout and the end of the runner all end the test host.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"

	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// hostFailed is the exit code for all that is not the command's.
const hostFailed = 125

func main() {
	// QEMU is to go with the thread that starts it: that must be one which stays.
	runtime.LockOSThread()
	followGo()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	status, err := testhost(ctx, os.Args[1:])
	stop()
	if err != nil {
		progress("%v", err)
		status = hostFailed
	}
	os.Exit(status)
}

// followGo ends this process with "go run", which passes no signal on.
func followGo() {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", os.Getppid()))
	if err == nil && strings.TrimSpace(string(name)) == "go" {
		unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGTERM), 0, 0, 0)
	}
}

func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, "testhost: "+format+"\n", args...) }

// options are the flags of all verbs.
type options struct {
	job
	pattern string
	verbose bool
}

func parse(verb string, args []string) (o options, rest []string, err error) {
	flags := flag.NewFlagSet("testhost "+verb, flag.ContinueOnError)
	flags.StringVar(&o.results, "results", "", "`DIR` for the consoles and what is written to /host/results (default bin/test-host)")
	flags.StringVar(&o.disk, "disk", "", "`FILE` that is the disk at /var/lib, made if absent, and kept")
	flags.StringVar(&o.format, "state", "ext4", "file system of a new disk at /var/lib: ext4, or xfs with reflink")
	flags.StringVar(&o.reboot, "reboot", "", "run the command again (BANGER_TEST_BOOT=2) after a reboot: orderly, or cut for a power cut")
	flags.IntVar(&o.memory, "memory", 6144, "memory in `MIB`")
	flags.DurationVar(&o.timeout, "timeout", 30*time.Minute, "of all, but the wait for another test host")
	if verb == "test" {
		flags.StringVar(&o.pattern, "run", "", "which tests, a `REGEXP` (default those that need testhost, with -reboot those that need reboot)")
		flags.BoolVar(&o.verbose, "v", false, "name each test")
	}
	if err := flags.Parse(args); err != nil {
		return o, nil, err
	}
	if !slices.Contains([]string{"ext4", "xfs"}, o.format) || !slices.Contains([]string{"", "orderly", "cut"}, o.reboot) {
		return o, nil, fmt.Errorf("-state is ext4 or xfs, -reboot is orderly or cut")
	}
	if o.disk != "" {
		if o.disk, err = filepath.Abs(o.disk); err != nil {
			return o, nil, err
		}
	}
	if o.tree, err = findTree(); err != nil {
		return o, nil, err
	}
	if o.results == "" {
		o.results = filepath.Join(o.tree, "bin", "test-host")
	}
	if o.results, err = filepath.Abs(o.results); err != nil {
		return o, nil, err
	}
	// A disk that is kept is worth an orderly end.
	o.end = "cut"
	if o.disk != "" {
		o.end = "orderly"
	}
	o.cache, err = cacheDir()
	return o, flags.Args(), err
}

// findTree gives the top of the repository.
func findTree() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("cannot find the repository: %w", err)
	}
	mod := strings.TrimSpace(string(out))
	if filepath.Base(mod) != "go.mod" {
		return "", errors.New("cannot find the repository: run it there")
	}
	return filepath.EvalSymlinks(filepath.Dir(mod))
}

func testhost(ctx context.Context, args []string) (int, error) {
	if len(args) == 0 {
		return 0, errors.New("usage: testhost build|run|test|shell, see -h of each")
	}
	o, rest, err := parse(args[0], args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	switch args[0] {
	case "build":
		if _, err := findImage(ctx, o.cache); err != nil {
			return 0, err
		}
		_, err := findFirecracker(ctx, o.cache)
		return 0, err
	case "run":
		if len(rest) == 0 {
			return 0, errors.New("usage: testhost run [flags] -- COMMAND [ARG…]")
		}
		for i, word := range rest {
			rest[i] = quote(word)
		}
		o.command = strings.Join(rest, " ")
		return o.run(ctx, nil, os.Stdout)
	case "test":
		return test(ctx, o, rest)
	case "shell":
		return shell(ctx, o)
	}
	return 0, fmt.Errorf("testhost does not know %q", args[0])
}

// test compiles the tests and runs them.
func test(ctx context.Context, o options, args []string) (int, error) {
	var names, flags []string
	names = args
	if at := slices.IndexFunc(args, func(a string) bool { return strings.HasPrefix(a, "-") }); at >= 0 {
		names, flags = args[:at], args[at:]
	}
	if len(flags) > 0 && flags[0] == "--" {
		flags = flags[1:]
	}
	if len(names) == 0 {
		names = []string{"./..."}
	}
	if o.verbose {
		flags = append(flags, "-test.v")
	}
	what := "testhost"
	if o.reboot != "" {
		what = "reboot"
	}
	packages, err := findPackages(ctx, o.tree, names, what, o.pattern)
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "banger-testhost-tests-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := compile(ctx, o.tree, dir, packages); err != nil {
		return 0, err
	}
	o.tests = dir
	o.command = script(packages, append(flags, "-test.timeout="+o.timeout.String()))
	return o.run(ctx, nil, os.Stdout)
}

// shell gives the terminal a root shell in the test host.
func shell(ctx context.Context, o options) (int, error) {
	in := int(os.Stdin.Fd())
	if !term.IsTerminal(in) {
		return 0, errors.New("a shell takes a terminal")
	}
	width, height, err := term.GetSize(in)
	if err != nil {
		return 0, err
	}
	o.shell, o.term, o.size = true, os.Getenv("TERM"), fmt.Sprintf("rows %d cols %d", height, width)
	o.command = "exec bash -l"
	o.timeout = 24 * time.Hour
	progress("a shell in the test host takes 20 s; exit ends it")
	before, err := term.GetState(in)
	if err != nil {
		return 0, err
	}
	defer term.Restore(in, before)
	return o.run(ctx, os.Stdin, &rawTerminal{fd: in})
}

// rawTerminal hands the terminal over with the first output of the shell: until then
// Ctrl-C is ours.
type rawTerminal struct {
	fd  int
	raw bool
}

func (r *rawTerminal) Write(b []byte) (int, error) {
	if !r.raw && len(b) > 0 {
		if _, err := term.MakeRaw(r.fd); err != nil {
			return 0, err
		}
		r.raw = true
	}
	return os.Stdout.Write(b)
}
