package shim

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestHeldWithoutALock(t *testing.T) {
	dir := t.TempDir()
	for _, prepare := range []func() error{
		func() error { return nil },
		func() error { return os.Mkdir(filepath.Join(dir, "run"), 0o700) },
		func() error { return os.WriteFile(filepath.Join(dir, lockFile), nil, 0o600) },
		func() error { return os.RemoveAll(filepath.Join(dir, "run")) },
	} {
		if err := prepare(); err != nil {
			t.Fatal(err)
		}
		if held(t, dir) {
			t.Error("held")
		}
	}
}

// Asking must not take the lock: two who ask at once would see each other.
func TestAskingTakesNothing(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, lockFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	results := make(chan bool, 8)
	for range cap(results) {
		go func() {
			any := false
			for range 500 {
				h, err := Held(dir)
				any = any || h || err != nil
			}
			results <- any
		}()
	}
	for range cap(results) {
		if <-results {
			t.Error("somebody saw a free lock as held")
		}
	}
}

// No pid and no file says that a VM runs: only the lock does.
func TestPidsSayNothing(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, sleeper())
	if err := syscall.Kill(s.Shim.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitDone(t, s)
	eventually(t, "the lock is free", func() bool { return !held(t, dir) })
	// As if the pids had been given to others, here to this process.
	self, err := identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	who, err := Processes(dir)
	if err != nil {
		t.Fatal(err)
	}
	who.Shim, who.VMM = self, self
	if err := writeJSON(filepath.Join(dir, processesFile), who, false); err != nil {
		t.Fatal(err)
	}
	if held(t, dir) {
		t.Error("held by a recycled pid")
	}
	// And the other way round: the files are lost, the VM runs.
	s = launchVM(t, dir, sleeper())
	for _, name := range []string{processesFile, configFile} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if !held(t, dir) || !lives(s.VMM.PID) {
		t.Error("a VM without its files is not seen")
	}
}

func TestVMOutlivesTheDaemon(t *testing.T) {
	dir := t.TempDir()
	d := startDaemon(t, program(), dir, "sleep", "1000")
	shim, vmm := d.launched(t)
	d.kill()
	if !held(t, dir) || !lives(shim) || !lives(vmm) {
		t.Fatal("the VM died with the daemon")
	}
	if who, err := Processes(dir); err != nil || who.Shim.PID != shim || who.VMM.PID != vmm {
		t.Errorf("processes.json has %+v, %v", who, err)
	}
	if err := syscall.Kill(vmm, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the lock is free", func() bool { return !held(t, dir) })
	// Free means that the end is written down.
	if e := mustReadExit(t, dir); e.How != Signaled || e.Signal != "KILL" {
		t.Errorf("exit.json has %+v", e)
	}
}

func TestKilledShimTakesTheVMM(t *testing.T) {
	dir := t.TempDir()
	d := startDaemon(t, program(), dir, "sleep", "1000")
	shim, vmm := d.launched(t)
	if err := syscall.Kill(shim, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the VMM is dead", func() bool { return !lives(vmm) })
	eventually(t, "the lock is free", func() bool { return !held(t, dir) })
	// The daemon took over the orphan and does not reap: the zombie holds nothing.
	eventually(t, "the VMM is a zombie", func() bool { return state(vmm) == "Z" })
	if held(t, dir) {
		t.Error("a zombie holds the lock")
	}
	if _, err := ReadExit(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("exit.json: %v", err)
	}
}

// Pdeathsig comes when the forking thread ends, so it must be the one that lives as
// long as the shim: its first.
func TestVMMIsForkedFromTheFirstThread(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, sleeper())
	pid := strconv.Itoa(s.Shim.PID)
	data, err := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(strings.Fields(string(data)), strconv.Itoa(s.VMM.PID)) {
		t.Errorf("the first thread's children are %q, the VMM is %d", data, s.VMM.PID)
	}
}

// A daemon that is killed at any instruction leaves either nothing held or a
// supervised VMM.
func TestDaemonKilledAnywhere(t *testing.T) {
	nothing, supervised := 0, 0
	for i := range 40 {
		dir := t.TempDir()
		d := startDaemon(t, program(), dir, "sleep", "1000")
		if i == 39 {
			d.launched(t)
		}
		// The pace of the daemon, not a wait for anything.
		time.Sleep(time.Duration(i) * 100 * time.Microsecond)
		d.kill()
		var who Supervised
		eventually(t, "nothing or a supervised VMM", func() bool {
			if !held(t, dir) {
				return true
			}
			var err error
			who, err = Processes(dir)
			return err == nil && who.VMM.PID != 0
		})
		if !held(t, dir) {
			nothing++
			if left := living(inDir(t, dir)); len(left) > 0 {
				t.Errorf("after %d: nothing is held, but %v run", i, left)
			}
			continue
		}
		supervised++
		if !lives(who.VMM.PID) || !lives(who.Shim.PID) {
			t.Errorf("after %d: held, but %+v", i, who)
		}
		if err := syscall.Kill(who.Shim.PID, syscall.SIGKILL); err != nil {
			t.Errorf("after %d: %v", i, err)
		}
		eventually(t, "the lock is free", func() bool { return !held(t, dir) })
		eventually(t, "nothing runs", func() bool { return len(living(inDir(t, dir))) == 0 })
	}
	t.Logf("nothing %d times, supervised %d times", nothing, supervised)
	if supervised == 0 {
		t.Error("no daemon got as far as a supervised VMM")
	}
}

// Between the fork in the daemon and the fork in the shim there is no VMM yet and
// perhaps no daemon any more. The lock covers it.
func TestDaemonDiesBeforeTheVMMStarts(t *testing.T) {
	for _, end := range []string{"the shim goes on", "the shim dies"} {
		t.Run(end, func(t *testing.T) {
			dir := t.TempDir()
			d := startDaemon(t, heldShim(t), dir, "sleep", "1000")
			eventually(t, "the shim was forked", func() bool { return len(inDir(t, dir)) > 0 })
			d.kill()
			if !held(t, dir) {
				t.Fatal("not held")
			}
			if _, err := Processes(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("processes.json: %v", err)
			}
			if end == "the shim dies" {
				for _, pid := range inDir(t, dir) {
					if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
						t.Fatal(err)
					}
				}
				eventually(t, "the lock is free", func() bool { return !held(t, dir) })
				return
			}
			if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			var who Supervised
			eventually(t, "the VMM runs", func() bool {
				if !held(t, dir) {
					t.Fatal("not held")
				}
				who, _ = Processes(dir)
				return who.VMM.PID != 0
			})
			if !lives(who.VMM.PID) {
				t.Error("the VMM does not live")
			}
			if err := syscall.Kill(who.VMM.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the lock is free", func() bool { return !held(t, dir) })
			mustReadExit(t, dir)
		})
	}
}

func living(pids []int) []int {
	return slices.DeleteFunc(pids, func(pid int) bool { return !lives(pid) })
}
