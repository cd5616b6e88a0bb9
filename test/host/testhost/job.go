package main

import (
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

//go:embed start.sh
var startScript string

// job is what the test host is booted for.
type job struct {
	command string // for bash, as root, in the tree
	tests   string // directory of test binaries, may be empty
	tree    string
	cache   string
	results string
	disk    string // kept; empty for one that goes with the run
	format  string // of a new disk: ext4 or xfs
	memory  int
	reboot  string // "", or how the first boot ends: orderly, cut
	end     string // how the last boot ends
	shell   bool
	term    string
	size    string        // of the terminal, for stty
	timeout time.Duration // from the lock on
}

// run boots the test host for a job, twice if it is to be rebooted, and gives the exit
// code of the command. One test host runs on a machine at a time.
func (j job) run(ctx context.Context, in io.Reader, out io.Writer) (int, error) {
	img, err := findImage(ctx, j.cache)
	if err != nil {
		return 0, err
	}
	firecracker, err := findFirecracker(ctx, j.cache)
	if err != nil {
		return 0, err
	}
	unlock, err := lock(ctx, filepath.Join(j.cache, "testhost", "run.lock"), "another test host to end")
	if err != nil {
		return 0, err
	}
	defer unlock()
	ctx, cancel := context.WithTimeoutCause(ctx, j.timeout, fmt.Errorf("not done in %s", j.timeout))
	defer cancel()
	if err := emptyDir(j.results); err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "banger-testhost-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := j.fill(ctx, dir, firecracker); err != nil {
		return 0, err
	}
	if j.disk == "" {
		j.disk = filepath.Join(j.cache, "testhost", "state")
		os.Remove(j.disk)
		defer os.Remove(j.disk)
	}
	if err := makeDisk(ctx, j.disk, j.format); err != nil {
		return 0, err
	}
	m := machine{image: img, state: j.disk, memory: j.memory, shell: j.shell, shares: []share{
		{"job", dir, false}, {"tree", j.tree, false}, {"cache", j.cache, false}, {"results", j.results, true},
	}}
	ends := []string{j.end}
	if j.reboot != "" {
		ends = []string{j.reboot, j.end}
	}
	for i, end := range ends {
		os.Remove(filepath.Join(j.results, "started"))
		mark := rand.Text()
		if err := j.writeSettings(dir, mark, end, i+1); err != nil {
			return 0, err
		}
		m.console = filepath.Join(j.results, fmt.Sprintf("console.%d", i+1))
		begin := time.Now()
		status, err := m.boot(ctx, mark, end == "orderly", in, out)
		if !j.shell {
			started, _ := os.ReadFile(filepath.Join(j.results, "started"))
			progress("boot %d took %.1f s; %s", i+1, time.Since(begin).Seconds(), strings.TrimSpace(string(started)))
		}
		if err != nil || status != 0 {
			return status, err
		}
	}
	return 0, nil
}

// fill makes the share with the job in dir.
func (j job) fill(ctx context.Context, dir, firecracker string) error {
	tests := j.tests
	if tests == "" {
		tests = filepath.Join(dir, "none")
		if err := os.Mkdir(tests, 0o755); err != nil {
			return err
		}
	}
	for to, from := range map[string]string{"firecracker": firecracker, "tests": tests} {
		if err := os.CopyFS(filepath.Join(dir, to), os.DirFS(from)); err != nil {
			return err
		}
	}
	return errors.Join(os.WriteFile(filepath.Join(dir, "start"), []byte(startScript), 0o644),
		os.WriteFile(filepath.Join(dir, "command"), []byte(j.command+"\n"), 0o644))
}

func (j job) writeSettings(dir, mark, end string, boot int) error {
	port := "/dev/virtio-ports/testhost"
	if j.shell {
		port = "/dev/hvc0"
	}
	settings := fmt.Sprintf("TESTHOST_MARK=%s TESTHOST_END=%s TESTHOST_BOOT=%d TESTHOST_REBOOT=%s TESTHOST_PORT=%s TESTHOST_TERM=%s TESTHOST_SIZE=%s\n",
		mark, end, boot, j.reboot, port, quote(j.term), quote(j.size))
	return os.WriteFile(filepath.Join(dir, "settings"), []byte(settings), 0o644)
}

// makeDisk makes the disk at /var/lib unless it is there.
func makeDisk(ctx context.Context, path, format string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(16 << 30); err != nil {
		return err
	}
	argv := []string{"mkfs." + format, "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", path}
	if format == "xfs" {
		argv = []string{"mkfs.xfs", "-q", "-m", "reflink=1", path}
	}
	mkfs := exec.CommandContext(ctx, argv[0], argv[1:]...)
	mkfs.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := mkfs.CombinedOutput(); err != nil {
		os.Remove(path)
		return fmt.Errorf("cannot make the disk %s: %w\n%s", path, err, out)
	}
	return nil
}

// emptyDir makes an empty directory, of one that has results of another run if need be.
func emptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "console.1")); len(entries) > 0 && err != nil {
		return fmt.Errorf("%s is not empty and not of an earlier run", dir)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// quote writes a word for a shell.
func quote(word string) string { return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'" }
