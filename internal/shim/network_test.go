package shim

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// playNetwork adds a line to the file "starts" first.
func playNetwork(what string) int {
	if what == "moan" {
		for i := range moanLines {
			os.Stderr.WriteString(spamLine(i))
		}
	}
	file, err := os.OpenFile("starts", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return 9
	}
	if _, err := fmt.Fprintln(file, os.Getpid()); err != nil {
		return 9
	}
	file.Close()
	switch what {
	case "crash":
		os.Stderr.WriteString("net: oops\n")
		return 1
	case "write": // at SIGTERM, and then it ends
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		if os.WriteFile("net-ready", nil, 0o600) != nil {
			return 9
		}
		<-c
		os.Stderr.WriteString("net: goodbye\n")
		return 0
	}
	hear("net-heard")
	return 0
}

const moanLines = 5_000

// withNetwork gives cfg a network process that the test binary plays, of a file of its
// own.
func withNetwork(t *testing.T, cfg Config, what string) Config {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "banger-net")
	if err := os.WriteFile(program, self, 0o700); err != nil {
		t.Fatal(err)
	}
	cfg.Network = &Network{
		Program: program, Argv: []string{"banger-net", what},
		Env: []string{roleEnv + "=net", "GORACE=atexit_sleep_ms=0"},
	}
	return cfg
}

// starts are the pids of the network processes so far.
func starts(t *testing.T, dir string) []string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "starts"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Fields(string(data))
}

// awaitNetwork waits for a network process after the one with pid old: it runs, and
// processes.json names it.
func awaitNetwork(t *testing.T, dir string, old int) Process {
	t.Helper()
	var net Process
	eventually(t, "a network process runs", func() bool {
		who, err := Processes(dir)
		net = who.Net
		all := starts(t, dir)
		return err == nil && net.PID != old && lives(net.PID) &&
			len(all) > 0 && all[len(all)-1] == strconv.Itoa(net.PID)
	})
	return net
}

func kill(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
}

// The program is gone from the disk before the first restart, as after an upgrade.
func TestNetworkIsRestarted(t *testing.T) {
	dir := t.TempDir()
	cfg := withNetwork(t, sleeper(), "run")
	s := launchVM(t, dir, cfg)
	if s.Net.PID == 0 || s.Net.StartTime < s.Shim.StartTime || s.VMM.StartTime < s.Net.StartTime {
		t.Errorf("started %+v", s)
	}
	if err := os.RemoveAll(filepath.Dir(cfg.Network.Program)); err != nil {
		t.Fatal(err)
	}
	net := awaitNetwork(t, dir, 0)
	for range 3 {
		kill(t, net.PID, syscall.SIGKILL)
		was := net
		net = awaitNetwork(t, dir, was.PID)
		if state(was.PID) != "" {
			t.Errorf("%d was not reaped", was.PID)
		}
	}
	who, err := Processes(dir)
	if err != nil || who.Net.StartTime == 0 {
		t.Errorf("processes.json has %+v, %v", who, err)
	}
	who.Net = s.Net
	if who != s {
		t.Errorf("processes.json has %+v, was %+v", who, s)
	}
	checkNetwork(t, dir, s.Shim.PID, net.PID, cfg.Network)

	kill(t, s.VMM.PID, syscall.SIGKILL)
	awaitDone(t, s)
	if e := mustReadExit(t, dir); e.How != Signaled || e.Signal != "KILL" {
		t.Errorf("exit.json has %+v", e)
	}
	if left := inDir(t, dir); len(left) > 0 || held(t, dir) {
		t.Errorf("left are %v", left)
	}
}

// checkNetwork looks at what a network process that was restarted is given.
func checkNetwork(t *testing.T, dir string, shim, net int, cfg *Network) {
	t.Helper()
	got := descriptors(t, net)
	for fd, file := range got {
		if strings.HasPrefix(file, dir) {
			t.Errorf("the network has %s as %d", file, fd)
		}
	}
	if got[0] != os.DevNull || got[1] != os.DevNull || !strings.HasPrefix(got[2], "pipe:") ||
		got[3] != cfg.Program+" (deleted)" {
		t.Errorf("the network has %v", got)
	}
	proc := "/proc/" + strconv.Itoa(net)
	if cwd, _ := os.Readlink(proc + "/cwd"); cwd != dir {
		t.Errorf("the network runs in %s", cwd)
	}
	for file, want := range map[string][]string{"cmdline": cfg.Argv, "environ": cfg.Env} {
		data, err := os.ReadFile(proc + "/" + file)
		if err != nil || string(data) != strings.Join(want, "\x00")+"\x00" {
			t.Errorf("its %s is %q, %v", file, data, err)
		}
	}
	// Pdeathsig comes when the thread that forked ends.
	pid := strconv.Itoa(shim)
	children, err := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
	if err != nil || !slices.Contains(strings.Fields(string(children)), strconv.Itoa(net)) {
		t.Errorf("the first thread's children are %q, the network is %d, %v", children, net, err)
	}
}

func TestPauses(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		name        string
		lived, want []time.Duration
	}{
		{"a crash loop", make([]time.Duration, 10),
			[]time.Duration{10 * ms, 20 * ms, 40 * ms, 80 * ms, 160 * ms, 320 * ms, 640 * ms, 1000 * ms, 1000 * ms, 1000 * ms}},
		{"at once", []time.Duration{time.Second, time.Second, 0}, []time.Duration{0, 10 * ms, 20 * ms}},
		{"settled", []time.Duration{0, 0, 0, 10 * time.Second, 0}, []time.Duration{10 * ms, 20 * ms, 40 * ms, 0, 10 * ms}},
		{"not yet settled", []time.Duration{0, 0, 9 * time.Second, 0}, []time.Duration{10 * ms, 20 * ms, 40 * ms, 80 * ms}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var p pauses
			var got []time.Duration
			for _, lived := range c.lived {
				got = append(got, p.after(lived))
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("%v, want %v", got, c.want)
			}
		})
	}
}

// A busy machine can only make the loop slower than its pauses, never faster.
func TestNetworkThatCrashes(t *testing.T) {
	dir := t.TempDir()
	begun := time.Now()
	s := launchVM(t, dir, withNetwork(t, sleeper(), "crash"))
	const count = 6
	eventually(t, "it was started again and again", func() bool { return len(starts(t, dir)) >= count })
	n := len(starts(t, dir))
	lived := time.Since(begun)
	var least time.Duration
	for i := range n - 1 {
		least += min(10*time.Millisecond<<i, time.Second)
	}
	if lived < least {
		t.Errorf("%d starts in %v: the pauses alone take %v", n, lived, least)
	}
	if !held(t, dir) || !lives(s.VMM.PID) {
		t.Error("the VM is gone")
	}
	// The VM's end does not wait for a restart.
	kill(t, s.VMM.PID, syscall.SIGKILL)
	awaitDone(t, s)
	if left := inDir(t, dir); len(left) > 0 || held(t, dir) {
		t.Errorf("left are %v", left)
	}
	if e := mustReadExit(t, dir); e.Signal != "KILL" || e.Stderr != "" {
		t.Errorf("exit.json has %+v", e)
	}
	data, err := os.ReadFile(filepath.Join(dir, networkStderrFile))
	if err != nil || bytes.Count(data, []byte("net: oops\n")) < count {
		t.Errorf("its standard error is %q, %v", data, err)
	}
}

// Whoever sees the end of the VM sees that of the network too.
func TestNetworkEndsWithTheVMM(t *testing.T) {
	t.Run("seen by exit.json", func(t *testing.T) {
		dir := t.TempDir()
		s := launchVM(t, dir, withNetwork(t, vmm(t, "obey"), "run"))
		net := awaitNetwork(t, dir, 0)
		eventually(t, "the VMM is ready", func() bool {
			_, err := os.Stat(filepath.Join(dir, "ready"))
			return err == nil
		})
		kill(t, s.Shim.PID, syscall.SIGTERM)
		var e Exit
		eventually(t, "exit.json is there", func() bool {
			var err error
			e, err = ReadExit(dir)
			return err == nil
		})
		if state(net.PID) != "" || e.Code != 7 {
			t.Errorf("the network is in state %q, exit.json has %+v", state(net.PID), e)
		}
	})
	t.Run("seen by the lock", func(t *testing.T) {
		dir := t.TempDir()
		s := launchVM(t, dir, withNetwork(t, sleeper(), "run"))
		net := awaitNetwork(t, dir, 0)
		kill(t, s.VMM.PID, syscall.SIGKILL)
		eventually(t, "the lock is free", func() bool { return !held(t, dir) })
		if state(net.PID) != "" {
			t.Errorf("the network is in state %q", state(net.PID))
		}
	})
}

// The network may write what it still holds, and whoever sees the end of the VM sees that.
// One that does not end by itself is killed: the other tests have such.
func TestNetworkSaysGoodbye(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, withNetwork(t, sleeper(), "write"))
	awaitNetwork(t, dir, 0)
	eventually(t, "the network listens", func() bool {
		_, err := os.Stat(filepath.Join(dir, "net-ready"))
		return err == nil
	})
	kill(t, s.VMM.PID, syscall.SIGKILL)
	awaitDone(t, s)
	data, err := os.ReadFile(filepath.Join(dir, networkStderrFile))
	if err != nil || string(data) != "net: goodbye\n" {
		t.Errorf("network.stderr has %q, %v", data, err)
	}
	if all := starts(t, dir); len(all) != 1 {
		t.Errorf("the network was started %d times", len(all))
	}
}

func TestNetworkHearsNoSignals(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, withNetwork(t, vmm(t, "deaf"), "run"))
	net := awaitNetwork(t, dir, 0)
	eventually(t, "the VMM is ready", func() bool {
		data, _ := os.ReadFile(filepath.Join(dir, consoleFile))
		return string(data) == "ready\n"
	})
	kill(t, s.Shim.PID, syscall.SIGTERM)
	eventually(t, "the VMM has heard", func() bool {
		_, err := os.Stat(filepath.Join(dir, "heard"))
		return err == nil
	})
	if _, err := os.Stat(filepath.Join(dir, "net-heard")); err == nil || !lives(net.PID) {
		t.Error("the network got the VMM's signal")
	}
}

func TestKilledShimTakesTheNetwork(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, withNetwork(t, sleeper(), "run"))
	net := awaitNetwork(t, dir, 0)
	kill(t, net.PID, syscall.SIGKILL)
	net = awaitNetwork(t, dir, net.PID) // forked much later than the VMM
	kill(t, s.Shim.PID, syscall.SIGKILL)
	eventually(t, "both are dead", func() bool { return !lives(net.PID) && !lives(s.VMM.PID) })
	eventually(t, "the lock is free", func() bool { return !held(t, dir) })
}

func TestNetworkThatCannotStart(t *testing.T) {
	files := t.TempDir()
	for name, mode := range map[string]os.FileMode{"plain": 0o600, "nobinary": 0o700} {
		if err := os.WriteFile(filepath.Join(files, name), []byte("data"), mode); err != nil {
			t.Fatal(err)
		}
	}
	good := withNetwork(t, sleeper(), "run").Network.Program
	for _, c := range []struct {
		name, program, vmm, names string
		errno                     syscall.Errno
	}{
		{"missing", filepath.Join(files, "none"), "sleep", "banger-net", syscall.ENOENT},
		{"not executable", filepath.Join(files, "plain"), "sleep", "banger-net", syscall.EACCES},
		{"no program", filepath.Join(files, "nobinary"), "sleep", "banger-net", syscall.ENOEXEC},
		{"a directory", files, "sleep", "banger-net", syscall.EACCES},
		{"but the VMM", good, "/no/such/vmm", "/no/such/vmm", syscall.ENOENT},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			cfg := withNetwork(t, Config{Argv: []string{c.vmm, "1000"}}, "run")
			cfg.Network.Program = c.program
			_, err := Launch(t.Context(), dir, program(), cfg, nil)
			var start *StartError
			if !errors.As(err, &start) || !errors.Is(err, c.errno) || !strings.HasPrefix(start.Text, "cannot start "+c.names+": ") {
				t.Fatalf("error %v, want a StartError of %v that names %s", err, c.errno, c.names)
			}
			if left := inDir(t, dir); len(left) > 0 || held(t, dir) {
				t.Errorf("processes left: %v", left)
			}
			if e := mustReadExit(t, dir); e.How != StartFailed || !strings.Contains(e.Error, c.names) {
				t.Errorf("exit.json has %+v", e)
			}
		})
	}
	t.Run("no path", func(t *testing.T) {
		cfg := sleeper()
		cfg.Network = &Network{Program: "banger-net"}
		if _, err := Launch(t.Context(), t.TempDir(), program(), cfg, nil); err == nil {
			t.Error("no error")
		}
	})
}

// With the network as with the VMM: both ends are kept, and not more.
func TestNetworkStderrIsBounded(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, withNetwork(t, sleeper(), "moan"))
	awaitNetwork(t, dir, 0)
	kill(t, s.VMM.PID, syscall.SIGKILL)
	awaitDone(t, s)
	all := strings.Builder{}
	for i := range moanLines {
		all.WriteString(spamLine(i))
	}
	whole := all.String()
	want := whole[:stderrHead] + fmt.Sprintf("\n[%d bytes left out]\n", len(whole)-stderrHead-stderrTail) +
		whole[len(whole)-stderrTail:]
	data, err := os.ReadFile(filepath.Join(dir, networkStderrFile))
	if err != nil || string(data) != want {
		t.Errorf("network.stderr has %d bytes: %.80q, %v", len(data), data, err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, stderrFile)); err != nil || len(data) > 0 {
		t.Errorf("vmm.stderr has %.80q, %v", data, err)
	}
}

// A full disk keeps nobody from the network: only processes.json is late.
func TestNetworkIsRestartedOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	run := filepath.Join(dir, "run")
	smallDisk(t, run)
	s := launchVM(t, dir, withNetwork(t, sleeper(), "run"))
	first := awaitNetwork(t, dir, 0)
	fill(t, filepath.Join(run, "ballast"))
	kill(t, first.PID, syscall.SIGKILL)
	eventually(t, "it was restarted", func() bool { return len(starts(t, dir)) == 2 })
	second, err := strconv.Atoi(starts(t, dir)[1])
	if err != nil {
		t.Fatal(err)
	}
	if who, err := Processes(dir); err != nil || who != s {
		t.Errorf("processes.json has %+v, %v, was %+v", who, err, s)
	}
	if err := os.Remove(filepath.Join(run, "ballast")); err != nil {
		t.Fatal(err)
	}
	kill(t, second, syscall.SIGKILL)
	awaitNetwork(t, dir, second)
}

func TestResidentSetWithNetwork(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, withNetwork(t, vmm(t, "obey"), "moan"))
	net := awaitNetwork(t, dir, 0)
	kill(t, net.PID, syscall.SIGKILL)
	awaitNetwork(t, dir, net.PID)
	checkResidentSet(t, s)
}
