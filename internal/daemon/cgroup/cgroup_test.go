package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"banger/internal/daemon/driver"
	"banger/internal/shim"
)

func TestLimits(t *testing.T) {
	for _, c := range []struct {
		limits driver.Limits
		want   string
	}{
		{driver.Limits{}, "memory.max=max memory.swap.max=0 memory.oom.group=1 cpu.max=max 100000 pids.max=256"},
		{driver.Limits{Memory: 1 << 30, CPUs: 2}, "memory.max=1409286144 memory.swap.max=0 memory.oom.group=1 cpu.max=300000 100000 pids.max=256"},
	} {
		var got []string
		for _, s := range limits(c.limits) {
			got = append(got, strings.TrimPrefix(s.file, "vmm/")+"="+s.value)
		}
		if all := strings.Join(got, " "); all != c.want {
			t.Errorf("%+v: %s, want %s", c.limits, all, c.want)
		}
	}
}

func TestNames(t *testing.T) {
	m := New("0a1b2c")
	if got := m.Group("00ff"); got != "/sys/fs/cgroup/system.slice/banger-0a1b2c-00ff.scope/vmm" {
		t.Error(got)
	}
	got := m.objects([]string{"banger-0a1b2c-00ff.scope", "cron.service", "banger-0a1b2d-00ff.scope", "banger-0a1b2c-.scope",
		"banger-0a1b2c-00ff.scope", "banger-0a1b2c-00ee.service", "banger-0a1b2c-00ee.scope"})
	want := []driver.Object{{Kind: "cgroup", Name: "banger-0a1b2c-00ee.scope", VM: "00ee"}, {Kind: "cgroup", Name: "banger-0a1b2c-00ff.scope", VM: "00ff"}}
	if !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
}

func TestProbe(t *testing.T) {
	h := newHost(t)
	if err := h.m.Probe(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestPlaceAndRemove(t *testing.T) {
	h := newHost(t)
	v := h.launch("00ff", 1, driver.Limits{Memory: 1 << 30, CPUs: 2})
	group := h.m.Group(v.id)
	scope := filepath.Dir(group)
	for leaf, pid := range map[string]int{"shim": v.who.Shim.PID, "vmm": v.who.VMM.PID} {
		if got := read(t, filepath.Join(scope, leaf, "cgroup.procs")); got != strconv.Itoa(pid) {
			t.Errorf("in %s is %s, want %d", leaf, got, pid)
		}
	}
	for file, want := range map[string]string{
		"memory.max": "1409286144", "memory.swap.max": "0", "memory.oom.group": "1", "cpu.max": "300000 100000", "pids.max": "256",
	} {
		if got := read(t, filepath.Join(group, file)); got != want {
			t.Errorf("%s is %s, want %s", file, got, want)
		}
	}
	want := []driver.Object{{Kind: "cgroup", Name: filepath.Base(scope), VM: v.id}}
	if got := h.list(t.Context()); !reflect.DeepEqual(got, want) {
		t.Errorf("listed %v", got)
	}
	// systemd forgets nothing of it, and takes none of the limits for its own.
	for _, verb := range []string{"daemon-reload", "daemon-reexec"} {
		if out, err := exec.CommandContext(t.Context(), "systemctl", verb).CombinedOutput(); err != nil {
			t.Fatalf("%v, %s", err, out)
		}
		if got := read(t, filepath.Join(group, "memory.max")); got != "1409286144" || !v.held() {
			t.Errorf("after %s: %s", verb, got)
		}
	}
	second := exec.Command("sleep", "1000")
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = second.Wait() }()
	defer func() { _ = second.Process.Kill() }()
	if err := h.m.Place(t.Context(), v.id, second.Process.Pid, driver.Limits{}); err == nil || !v.held() {
		t.Errorf("a second process beside a VM that runs: %v", err)
	}
	for range 2 { // the second time it is absent
		if err := h.m.Remove(t.Context(), v.id); err != nil {
			t.Fatal(err)
		}
		if v.held() || threads(v.who.VMM.PID) > 0 || threads(v.who.Shim.PID) > 0 {
			t.Error("removed, and runs")
		}
		if _, err := os.Stat(scope); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the scope: %v", err)
		}
		if got := h.list(t.Context()); len(got) > 0 {
			t.Errorf("listed %v", got)
		}
	}
}

// What is left by itself when the VM ends by itself: nothing.
func TestScopeGoesWithTheVM(t *testing.T) {
	h := newHost(t)
	for range 5 { // at once again, while systemd may still know the scope
		v := h.launch("00ff", 1, driver.Limits{})
		v.kill(v.who.VMM.PID)
		v.eventually("the VM is gone", func() bool { return !v.held() })
		if e, err := shim.ReadExit(v.dir); err != nil || e.Signal != "KILL" || e.OutOfMemory {
			t.Errorf("exit.json has %+v, %v", e, err)
		}
	}
	h.eventually("the scope is gone", func() bool { return len(h.list(t.Context())) == 0 })
}

// A scope that is made again as soon as it is empty.
func TestScopeOfTheRunBefore(t *testing.T) {
	h := newHost(t)
	for range 20 {
		sleep := exec.Command("sleep", "1000")
		if err := sleep.Start(); err != nil {
			t.Fatal(err)
		}
		err := h.m.Place(t.Context(), "00ff", sleep.Process.Pid, driver.Limits{})
		_ = sleep.Process.Kill()
		_ = sleep.Wait()
		if err != nil {
			t.Fatal(err)
		}
	}
}

// A daemon that is killed before it has furnished the scope leaves a shim that waits.
func TestBareScope(t *testing.T) {
	h := newHost(t)
	waits := exec.Command("sleep", "1000")
	if err := waits.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = waits.Wait() }()
	defer func() { _ = waits.Process.Kill() }()
	if err := h.m.startScope(t.Context(), "00ff", waits.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if err := h.m.Remove(t.Context(), "00ff"); err != nil {
		t.Fatal(err)
	}
	if threads(waits.Process.Pid) > 0 || len(h.list(t.Context())) > 0 {
		t.Error("it was not removed")
	}
}

func TestProcessThatIsGone(t *testing.T) {
	h := newHost(t)
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	if err := h.m.Place(t.Context(), "00ff", gone.Process.Pid, driver.Limits{}); err == nil {
		t.Error("placed")
	} else {
		t.Log(err)
	}
	if err := h.m.Remove(t.Context(), "00ff"); err != nil {
		t.Error(err)
	}
}

// Groups of which systemd knows nothing, and those of others.
func TestInventory(t *testing.T) {
	h, other := newHost(t), newHost(t)
	lost := filepath.Join(root, slice, h.m.unit("00aa"), "vmm")
	if err := os.MkdirAll(lost, 0o755); err != nil {
		t.Fatal(err)
	}
	theirs := other.launch("00aa", 1, driver.Limits{})
	ours := h.list(t.Context())
	if len(ours) != 1 || ours[0].VM != "00aa" {
		t.Fatalf("listed %v", ours)
	}
	if err := other.m.Inventory().Remove(t.Context(), ours[0]); err == nil {
		t.Error("another instance's was removed")
	}
	if err := h.m.Inventory().Remove(t.Context(), ours[0]); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Dir(lost)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the lost group: %v", err)
	}
	if got := h.list(t.Context()); len(got) > 0 || !theirs.held() {
		t.Errorf("listed %v", got)
	}
}

func TestVMOutlivesTheUnitOfTheDaemon(t *testing.T) {
	h := newHost(t)
	v := machine{host: h, id: "00ff", dir: t.TempDir()}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	unit := "banger-test-" + h.m.instance + ".service"
	systemctl := func(verb string) string {
		out, _ := exec.Command("systemctl", verb, unit).CombinedOutput()
		return strings.TrimSpace(string(out))
	}
	out, err := exec.CommandContext(t.Context(), "systemd-run", "--unit="+unit, "--collect", "--setenv="+roleEnv+"=daemon", self, h.m.instance, v.id, v.dir).CombinedOutput()
	if err != nil {
		t.Fatalf("%v, %s", err, out)
	}
	defer systemctl("stop")
	h.eventually("the VM runs", func() bool {
		v.who, err = shim.Processes(v.dir)
		if state := systemctl("is-active"); state != "active" {
			t.Fatalf("the daemon is %s: %s", state, systemctl("status"))
		}
		return err == nil && v.who.VMM.PID != 0
	})
	v.awaitTouched()
	if out := systemctl("stop"); out != "" {
		t.Error(out)
	}
	if state := systemctl("is-active"); state != "inactive" {
		t.Errorf("the daemon is %s", state)
	}
	if !v.held() || threads(v.who.VMM.PID) == 0 || threads(v.who.Shim.PID) == 0 {
		t.Error("the VM ended with the unit of the daemon")
	}
	if len(h.list(t.Context())) != 1 {
		t.Error("the scope is gone")
	}
}

// A VM whose VMM dropped all that ties it to the shim and is large: the lock is free
// long before it is gone.
func TestKilledShimOfALargeVM(t *testing.T) {
	h := newHost(t)
	v := h.launch("00ff", 1536, driver.Limits{Memory: 2 << 30, CPUs: 1})
	v.awaitTouched()
	v.kill(v.who.Shim.PID)
	h.eventually("the lock is free", v.lockIsFree)
	free := time.Now()
	if !v.held() {
		t.Error("the VM is said to be gone as soon as the lock is free")
	}
	h.eventually("the VM is gone", func() bool { return !v.held() })
	t.Logf("gone %v after the lock was free", time.Since(free))
	if threads(v.who.VMM.PID) > 0 {
		t.Error("gone, but the VMM runs")
	}
}

func TestOutOfMemory(t *testing.T) {
	h := newHost(t)
	other := h.launch("00aa", 64, driver.Limits{Memory: 64 << 20, CPUs: 1})
	other.awaitTouched()
	v := h.launch("00ff", 800, driver.Limits{Memory: 64 << 20, CPUs: 1})
	h.eventually("the VM is gone", func() bool { return !v.held() })
	if e, err := shim.ReadExit(v.dir); err != nil || e.How != shim.Signaled || e.Signal != "KILL" || !e.OutOfMemory {
		t.Errorf("exit.json has %+v, %v", e, err)
	}
	if _, err := os.Stat(filepath.Join(v.dir, "touched")); err == nil {
		t.Error("it had all of its memory")
	}
	if !other.held() || threads(other.who.VMM.PID) == 0 {
		t.Error("the other VM ended too")
	}
}

// One after the other, alone and beside another VM, with the times for the record.
func TestManyInARow(t *testing.T) {
	h := newHost(t)
	h.manyInARow("alone")
	other := h.launch("00ff", 1, driver.Limits{Memory: 1 << 30, CPUs: 1})
	h.manyInARow("beside another")
	if !other.held() || read(t, filepath.Join(h.m.Group(other.id), "memory.max")) != "1409286144" {
		t.Error("the other VM was touched")
	}
}

func (h host) manyInARow(how string) {
	h.Helper()
	var place, remove []time.Duration
	for i := range 10 {
		sleep := exec.Command("sleep", "1000")
		if err := sleep.Start(); err != nil {
			h.Fatal(err)
		}
		vm := fmt.Sprintf("%04x", i)
		begun := time.Now()
		if err := h.m.Place(h.Context(), vm, sleep.Process.Pid, driver.Limits{Memory: 1 << 30, CPUs: 2}); err != nil {
			h.Error(err)
		}
		place = append(place, time.Since(begun))
		begun = time.Now()
		if err := h.m.Remove(h.Context(), vm); err != nil {
			h.Error(err)
		}
		remove = append(remove, time.Since(begun))
		if threads(sleep.Process.Pid) > 0 {
			h.Error("removed, and runs")
		}
		_ = sleep.Process.Kill()
		_ = sleep.Wait()
	}
	slices.Sort(place)
	slices.Sort(remove)
	n := len(place)
	h.Logf("%s, n %d: place %v (%v to %v), remove %v (%v to %v)", how, n, place[n/2], place[n/4], place[3*n/4], remove[n/2], remove[n/4], remove[3*n/4])
}
