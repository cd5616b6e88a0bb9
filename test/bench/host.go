package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"banger/internal/config"
)

// The limits of what is waited for. Under software emulation on a loaded machine a
// boot takes a minute.
const (
	bootTimeout  = 4 * time.Minute
	callTimeout  = 30 * time.Second
	pullTimeout  = 20 * time.Minute
	startTimeout = 60 * time.Second
	clearTimeout = 3 * time.Minute
)

// host is what all instances share: the programs under test, copied so that a build
// meanwhile changes nothing, and the state directory that has kernel and image.
type host struct {
	root   string // removed at the end
	bin    string
	golden config.Layout
	system bool // its daemons are the system's: in the test host
}

// newHost makes a host below cache, the directory that test/vm keeps its kernel and
// image in; they are made when they are not there.
func newHost(ctx context.Context, programs, cache string) (h *host, err error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	system := os.Getenv("BANGER_TEST_HOST") != ""
	near := cache
	if system {
		near = "" // the cache cannot be written to there
	}
	root, err := os.MkdirTemp(near, "bench-*")
	if err != nil {
		return nil, err
	}
	h = &host{root: root, bin: filepath.Join(root, "bin"), golden: config.Layout{Root: filepath.Join(cache, "golden")}, system: system}
	defer func() {
		if err != nil {
			h.close()
		}
	}()
	if err := os.Mkdir(h.bin, 0o700); err != nil {
		return nil, err
	}
	for _, name := range []string{"banger", "bangerd"} {
		if err := copyFile(filepath.Join(programs, name), filepath.Join(h.bin, name), 0o755); err != nil {
			return nil, fmt.Errorf("%w (make build comes first)", err)
		}
	}
	if h.system {
		return h, h.copyGolden(ctx)
	}
	return h, h.fill(ctx)
}

// copyGolden copies kernel and image out of the cache, which is another file system.
func (h *host) copyGolden(ctx context.Context) error {
	from := h.golden
	h.golden = config.Layout{Root: filepath.Join(h.root, "golden")}
	if err := os.Mkdir(h.golden.Root, 0o700); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "cp", "-a", "--sparse=auto", from.Kernels(), from.Images(), from.DB(), h.golden.Root).CombinedOutput()
	if err != nil {
		return fmt.Errorf("cp: %w: %s", err, out)
	}
	return nil
}

// fill sees to it that the golden directory has kernel and image.
func (h *host) fill(ctx context.Context) error {
	lock, err := os.OpenFile(h.golden.Root+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := flock(ctx, lock); err != nil {
		return err
	}
	i := &instance{host: h, layout: h.golden}
	ctx, cancel := context.WithTimeout(ctx, pullTimeout)
	defer cancel()
	for _, args := range [][]string{{"kernel", "pull", "debian-cloud"}, {"image", "pull", "debian-bookworm"}, {"daemon", "stop"}} {
		if _, err := i.banger(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// flock waits for the lock, which the tests hold only while they fill the directory.
func flock(ctx context.Context, f *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, pullTimeout)
	defer cancel()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil || !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cannot lock %s: %w", f.Name(), ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// close removes all of it. What still runs there is ended, and is an error.
func (h *host) close() error {
	var err error
	if left := processesBelow(h.root); len(left) > 0 {
		err = fmt.Errorf("left behind and killed: processes %v", left)
		for _, pid := range left {
			syscall.Kill(pid, syscall.SIGKILL)
			gone(pid, 10*time.Second)
		}
	}
	return errors.Join(err, os.RemoveAll(h.root))
}

// instance is one state directory, and the daemon that this program started on it.
type instance struct {
	host   *host
	layout config.Layout
	daemon *daemon  // nil while none runs
	env    []string // over the others
	// via, when there is one, calls what starts the daemon where it shall run.
	via func(start func() error) error
}

// newInstance makes a state directory with kernel and image as hard links.
func (h *host) newInstance(name string) (*instance, error) {
	l := config.Layout{Root: filepath.Join(h.root, name)}
	if err := l.Prepare(); err != nil {
		return nil, err
	}
	for _, dir := range []string{h.golden.Kernels(), h.golden.Images()} {
		if err := linkTree(dir, filepath.Join(l.Root, filepath.Base(dir))); err != nil {
			return nil, err
		}
	}
	if h.system {
		if err := l.MarkSystem(); err != nil {
			return nil, err
		}
	}
	if err := copyFile(h.golden.DB(), l.DB(), 0o600); err != nil {
		return nil, err
	}
	return &instance{host: h, layout: l}, nil
}

func linkTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		return os.Link(path, filepath.Join(to, rel))
	})
}

func copyFile(from, to string, mode fs.FileMode) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, mode)
}

// environment is that of all of banger's processes: no configuration of the user's.
func (i *instance) environment() []string {
	env := slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "BANGER") && !strings.HasPrefix(kv, "BANGER_FIRECRACKER_DIR=") || strings.HasPrefix(kv, "XDG_CONFIG_HOME=") || strings.HasPrefix(kv, "GOCOVERDIR=")
	})
	return append(append(env, "BANGER_STATE_DIR="+i.layout.Root, "XDG_CONFIG_HOME="+filepath.Join(i.host.root, "config"), "NO_COLOR=1"), i.env...)
}

// daemon is a bangerd as a child, so that its time and its end are seen exactly.
type daemon struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

func (d *daemon) pid() int { return d.cmd.Process.Pid }

// start starts bangerd as the CLI does and returns how long it took to be ready.
func (i *instance) start(ctx context.Context) (time.Duration, error) {
	pr, pw, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer pr.Close()
	log, err := os.OpenFile(i.layout.Log(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		pw.Close()
		return 0, err
	}
	defer log.Close()
	d := &daemon{cmd: exec.Command(filepath.Join(i.host.bin, "bangerd")), ended: make(chan struct{})}
	if i.host.system {
		d.cmd.Args = append(d.cmd.Args, "--system")
	}
	d.cmd.Env = append(i.environment(), "BANGER_READY_FD=3")
	d.cmd.Dir, d.cmd.Stdout, d.cmd.Stderr, d.cmd.ExtraFiles = "/", log, log, []*os.File{pw}
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is for this program only
	begun := time.Now()
	if i.via != nil {
		err = i.via(d.cmd.Start)
	} else {
		err = d.cmd.Start()
	}
	pw.Close()
	if err != nil {
		return 0, err
	}
	i.daemon = d
	go func() { d.cmd.Wait(); close(d.ended) }()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { pr.SetReadDeadline(time.Now()) })()
	var ready struct {
		Ready   bool
		Message string
	}
	err = json.NewDecoder(io.LimitReader(pr, 64<<10)).Decode(&ready)
	took := time.Since(begun)
	if err == nil && !ready.Ready {
		err = errors.New(ready.Message)
	}
	if err != nil {
		return 0, errors.Join(fmt.Errorf("bangerd does not come up: %w", err), i.kill())
	}
	return took, nil
}

// kill ends the daemon at once, as a crash would.
func (i *instance) kill() error { return i.end(syscall.SIGKILL, 10*time.Second) }

// stop asks the daemon to end; running VMs go on.
func (i *instance) stop() error { return i.end(syscall.SIGTERM, clearTimeout) }

func (i *instance) end(sig syscall.Signal, limit time.Duration) error {
	d := i.daemon
	if d == nil {
		return nil
	}
	i.daemon = nil
	d.cmd.Process.Signal(sig)
	select {
	case <-d.ended:
		return nil
	case <-time.After(limit):
		d.cmd.Process.Kill()
		<-d.ended
		return fmt.Errorf("bangerd did not end within %s of signal %s", limit, sig)
	}
}

// close removes the VMs and stops the daemon. It is not cut short by the Ctrl-C that
// led here.
func (i *instance) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), clearTimeout)
	defer cancel()
	var errs []error
	if i.daemon == nil && len(processesBelow(i.layout.Root)) > 0 {
		_, err := i.start(ctx)
		errs = append(errs, err)
	}
	if i.daemon != nil {
		errs = append(errs, i.client().removeAll(ctx))
	}
	return errors.Join(append(errs, i.stop())...)
}

// run is one finished process of the CLI.
type run struct {
	took time.Duration
	cpu  float64 // seconds
	out  string
}

// banger runs the CLI.
func (i *instance) banger(ctx context.Context, args ...string) (run, error) {
	return i.bangerFrom(ctx, nil, args...)
}

// bangerFrom runs the CLI with an input.
func (i *instance) bangerFrom(ctx context.Context, in io.Reader, args ...string) (run, error) {
	ctx, cancel := context.WithTimeout(ctx, pullTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(i.host.bin, "banger"), args...)
	cmd.Env = i.environment()
	var out, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &stderr
	begun := time.Now()
	err := cmd.Run()
	r := run{took: time.Since(begun), out: out.String()}
	if err != nil {
		return r, fmt.Errorf("banger %s: %w\n%s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	r.cpu = cpuOfState(cmd.ProcessState)
	return r, nil
}
