// Command bench measures banger against the bare thing, in interleaved pairs, and
// holds the figures against the targets. `make bench` builds banger and runs it, which
// takes about 25 minutes under software emulation, on a machine that does nothing
// else. Every target is judged by one rule, which is printed with the tables, on the
// samples of one run: nothing is measured again because of what came out.
//
// It works in a directory of its own beside the kernel and the image of test/vm, and
// removes it at the end, Ctrl-C included.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// bench is one run.
type bench struct {
	host    *host
	n       int
	settled time.Duration
	idleFor time.Duration
	log     io.Writer
	failed  []error // of clearing away
}

// benchmark is one part that can be chosen.
type benchmark struct {
	name string
	run  func(*bench, context.Context) (*part, error)
}

func benchmarks() []benchmark {
	return []benchmark{
		{"share", (*bench).share}, {"exec", (*bench).exec}, {"records", (*bench).records},
		{"ten", (*bench).ten}, {"idle", (*bench).idle}, {"network", (*bench).network},
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := mainErr(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func mainErr(ctx context.Context) error {
	b := &bench{log: os.Stderr}
	var names []string
	all := benchmarks()
	if os.Getenv("BANGER_TEST_HOST") != "" {
		all = jailedParts()
	}
	for _, m := range all {
		names = append(names, m.name)
	}
	only := flag.String("only", strings.Join(names, ","), "the parts to run")
	programs := flag.String("bin", "bin", "the directory of banger and bangerd")
	flag.IntVar(&b.n, "n", 20, "pairs; exec takes 50 rounds or more when it is at least 20")
	flag.DurationVar(&b.settled, "settle", time.Minute, "how long a guest settles before it counts as idle")
	flag.DurationVar(&b.idleFor, "idle", time.Minute, "how long an idle guest is watched")
	flag.Parse()
	if b.n < 1 || b.idleFor < windows*time.Second || flag.NArg() > 0 {
		return fmt.Errorf("-n must be 1 or more, -idle %ds or more, and there are no arguments", windows)
	}
	var chosen []benchmark
	for _, name := range strings.Split(*only, ",") {
		found := false
		for _, m := range all {
			if m.name == name {
				chosen, found = append(chosen, m), true
			}
		}
		if !found {
			return fmt.Errorf("there is no part %q: the parts are %s", name, strings.Join(names, ", "))
		}
	}
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	if b.host, err = newHost(ctx, *programs, cache); err != nil {
		return err
	}
	err = b.all(ctx, os.Stdout, chosen)
	return errors.Join(append(b.failed, err, b.host.close())...)
}

func cacheDir() (string, error) {
	if dir := os.Getenv("BANGER_TEST_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	cache, err := os.UserCacheDir()
	return filepath.Join(cache, "banger-test"), err
}

// all runs the chosen parts. One that fails does not keep the others from running.
func (b *bench) all(ctx context.Context, w io.Writer, chosen []benchmark) error {
	b.describe(ctx, w)
	var parts []*part
	var errs []error
	for _, m := range chosen {
		if ctx.Err() != nil {
			break
		}
		before := busy(ctx)
		p, err := m.run(b, ctx)
		b.progress("")
		if why := skipped(""); errors.As(err, &why) {
			fmt.Fprintf(w, "\n== %s was skipped: %s\n", m.name, why)
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.name, err))
			continue
		}
		after := busy(ctx)
		p.note("Other work took %.0f %% of the host's CPUs before, %.0f %% after.", before, after)
		if max(before, after) > quiet {
			p.note("The host was NOT QUIET: what is timed here is longer than it is, and differences say little.")
		}
		p.print(w)
		parts = append(parts, p)
	}
	if len(parts) > 0 {
		summary(w, parts)
	}
	if ctx.Err() != nil {
		errs = append(errs, context.Cause(ctx))
	}
	return errors.Join(errs...)
}

// skipped says why a part cannot be run here. It is no failure of the whole.
type skipped string

func (s skipped) Error() string { return string(s) }

// describe says what was measured, and on what.
func (b *bench) describe(ctx context.Context, w io.Writer) {
	i := &instance{host: b.host, layout: b.host.golden}
	version, _ := i.banger(ctx, "version")
	qemu, _ := exec.CommandContext(ctx, "qemu-system-x86_64", "-version").Output()
	first, _, _ := strings.Cut(string(qemu), "\n")
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	fmt.Fprintf(w, "%s, %s\n%s; Linux %s; %s; %d CPUs\n", strings.TrimSpace(version.out),
		time.Now().UTC().Format(time.RFC3339), first, strings.TrimSpace(string(release)), processor(), runtime.NumCPU())
}

func processor() string {
	data, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(data)) {
		if name, ok := strings.CutPrefix(line, "model name"); ok {
			return strings.Trim(name, " \t:\n")
		}
	}
	return runtime.GOARCH
}

// quiet is how busy a host may be with other work, in percent, before the report warns.
const quiet = 5

// busy is how much of the host's CPUs was in use over two seconds, in percent, while
// nothing of this program ran; what a hypervisor took away counts as used.
func busy(ctx context.Context) float64 {
	idle, total := ticks()
	if pause(ctx, 2*time.Second) != nil {
		return 0
	}
	idleNow, totalNow := ticks()
	return 100 * (1 - (idleNow-idle)/max(totalNow-total, 1))
}

// ticks reads the first line of /proc/stat, see proc(5).
func ticks() (idle, total float64) {
	data, _ := os.ReadFile("/proc/stat")
	first, _, _ := strings.Cut(string(data), "\n")
	for k, field := range strings.Fields(first) {
		v, _ := strconv.ParseFloat(field, 64)
		if k > 8 { // the time of guests is part of the user's
			break
		}
		total += v
		if k == 4 || k == 5 { // idle, iowait
			idle += v
		}
	}
	return idle, total
}

// progress shows what is going on, and with an empty text ends the line.
func (b *bench) progress(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if info, err := os.Stderr.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
		fmt.Fprintf(b.log, "\r\x1b[K%s", text)
	} else if text != "" {
		fmt.Fprintln(b.log, text)
	}
}

// rounds names the k-th of n rounds; the one before the first is not counted.
func rounds(k, n int) string {
	if k < 0 {
		return "warm up"
	}
	return fmt.Sprintf("round %d of %d", k+1, n)
}

// cleanUp clears something away; what cannot be is an error of the run.
func (b *bench) cleanUp(f func() error) {
	if err := f(); err != nil {
		b.failed = append(b.failed, fmt.Errorf("cannot clear away: %w", err))
	}
}
