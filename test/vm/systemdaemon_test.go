package vm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/cli"
	"banger/internal/daemon"
)

// envOrder makes this test binary the system's daemon: "kill POINT" ends it at a step of
// an operation by SIGKILL, "pause POINT" waits there for a file, "log" only names the steps.
const envOrder = "BANGER_TEST_ORDER"

func TestMain(m *testing.M) {
	if text := os.Getenv(envOrder); text != "" {
		o, err := parseOrder(text)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		programs := os.DirFS("../../cmd/bangerd/programs")
		os.Exit(cli.DaemonMain([]string{"--system"}, os.Stdout, os.Stderr, programs, daemon.WithHook(o.at)))
	}
	os.Exit(m.Run())
}

type order struct {
	what, point string
	log         *os.File
}

func parseOrder(text string) (*order, error) {
	o := &order{}
	o.what, o.point, _ = strings.Cut(text, " ")
	var err error
	o.log, err = os.OpenFile(pointsFile(os.Getenv("BANGER_STATE_DIR")), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	return o, err
}

func pointsFile(dir string) string { return dir + ".points" }
func goFile(dir string) string     { return dir + ".go" }

func (o *order) at(point string) error {
	fmt.Fprintln(o.log, point)
	if point != o.point {
		return nil
	}
	switch o.what {
	case "kill":
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case "pause":
		for deadline := time.Now().Add(bootTimeout); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if _, err := os.Stat(goFile(os.Getenv("BANGER_STATE_DIR"))); err == nil {
				return nil
			}
		}
	}
	return nil
}

// startOrdered starts the daemon that this test binary is, and returns its pid.
func (h *host) startOrdered(order string) int {
	h.t.Helper()
	return h.startDaemon(exec.Command(os.Args[0]), envOrder+"="+order)
}

// startSystem starts bangerd --system and waits until it serves.
func (h *host) startSystem() {
	h.t.Helper()
	h.startDaemon(exec.Command(filepath.Join(binDir(h.t), "bangerd"), "--system"))
}

func (h *host) startDaemon(c *exec.Cmd, env ...string) int {
	h.t.Helper()
	log, err := os.OpenFile(filepath.Join(filepath.Dir(h.dir), "bangerd.out"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer log.Close()
	c.Env, c.Stdout, c.Stderr = append(slices.Clone(h.env), env...), log, log
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	go c.Wait()
	machine := bangerv1connect.NewMachineClient(h.http(), "http://banger")
	waitFor(h.t, time.Minute, "the system's daemon to serve", func() bool {
		if isZombie(c.Process.Pid) {
			text, _ := os.ReadFile(log.Name())
			h.t.Fatalf("bangerd --system ended: %s", text)
		}
		// One that was killed may have its socket open for a moment more.
		status, err := machine.Status(context.Background(), &bangerv1.StatusRequest{})
		return err == nil && int(status.Pid) == c.Process.Pid
	})
	return c.Process.Pid
}

// replaceDaemon kills the daemon that serves and starts the one of that order at once.
func (h *host) replaceDaemon(order string) int {
	h.t.Helper()
	h.killDaemon(h.daemonPID())
	return h.startOrdered(order)
}

// points are the steps that daemons with an order have gone through.
func (h *host) points() []string {
	h.t.Helper()
	return strings.Split(strings.TrimSpace(read(h.t, pointsFile(h.dir))), "\n")
}

// leaks lists what of the instance is on the host, one thing a line.
func (h *host) leaks() string {
	found, _ := filepath.Glob(h.dir + "/vms/*")
	return strings.Join(append(h.held(), found...), "\n")
}

// held lists what running VMs of the instance hold on the host.
func (h *host) held() []string {
	id, err := os.ReadFile(filepath.Join(h.dir, "instance"))
	if err != nil {
		return []string{err.Error()}
	}
	instance := strings.TrimSpace(string(id))
	var left []string
	for _, argv := range [][]string{{"dmsetup", "ls"}, {"losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE"}} {
		out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		if err != nil {
			left = append(left, fmt.Sprintf("%v: %v: %s", argv, err, out))
		}
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, instance) || strings.Contains(line, h.dir) {
				left = append(left, argv[0]+": "+strings.TrimSpace(line))
			}
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/*/*" + instance + "*", "/sys/fs/cgroup/*" + instance + "*", "/dev/mapper/*" + instance + "*", h.dir + "/vms/*/run"} {
		found, _ := filepath.Glob(pattern)
		left = append(left, found...)
	}
	if out, err := exec.Command("systemctl", "list-units", "--all", "--plain", "--no-legend", "banger-"+instance+"-*").Output(); err != nil || len(out) > 0 {
		left = append(left, fmt.Sprintf("systemd: %s%v", out, err))
	}
	for _, pid := range processesBelow(h.dir + "/vms") {
		left = append(left, fmt.Sprint("process ", pid))
	}
	return left
}

// wantFree holds that nothing of the instance runs or lies about on the host. systemd and
// the kernel may be a moment behind.
func (h *host) wantFree(when string) {
	h.t.Helper()
	var left []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if left = h.held(); len(left) == 0 {
			return
		}
	}
	h.t.Fatalf("%s these are held:\n%s", when, strings.Join(left, "\n"))
}

// vmms are the processes on the host that are Firecracker, or its jailer, and not dead. One
// that gives its memory back counts: it may have the disk open.
func vmms() []string {
	var alive []string
	comms, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, path := range comms {
		comm, err := os.ReadFile(path)
		if name := strings.TrimSpace(string(comm)); err != nil || name != "firecracker" && name != "jailer" {
			continue
		}
		// A dead first thread may have others that live.
		stats, _ := filepath.Glob(filepath.Dir(path) + "/task/*/stat")
		if slices.ContainsFunc(stats, func(stat string) bool {
			data, err := os.ReadFile(stat)
			return err == nil && !strings.Contains(string(data), ") Z ") && !strings.Contains(string(data), ") X ")
		}) {
			alive = append(alive, filepath.Base(filepath.Dir(path)))
		}
	}
	return alive
}

// neverTwo looks until the end of the test whether there are two VMMs, in a test that has
// one VM.
func neverTwo(t *testing.T) {
	stop := make(chan struct{})
	var seen sync.WaitGroup
	looks := 0
	seen.Go(func() {
		for tick := time.NewTicker(50 * time.Millisecond); ; {
			select {
			case <-stop:
				tick.Stop()
				return
			case <-tick.C:
			}
			looks++
			if alive := vmms(); len(alive) > 1 {
				t.Errorf("two VMMs at once: %v", alive)
				return
			}
		}
	})
	t.Cleanup(func() {
		close(stop)
		seen.Wait()
		t.Logf("looked %d times for a second VMM", looks)
	})
}
