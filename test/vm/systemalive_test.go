package vm

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A guest outlives its daemon: one that is killed, one that ends, and one that systemd
// stops with all that is in its unit.
func TestSystemAdopts(t *testing.T) {
	h := newSystem(t)
	h.makeBare("dev", "512M")
	h.start("dev")
	h.ok("exec", "dev", "sh", "-c", "echo memory > /dev/shm/file")
	before := h.show("dev").Handles
	same := func(when string) {
		t.Helper()
		now := h.show("dev")
		for _, key := range []string{"shim pid", "vmm pid", "guest boot id"} {
			if now.Handles[key] != before[key] || before[key] == "" {
				t.Fatalf("%s: %s was %q, is %q", when, key, before[key], now.Handles[key])
			}
		}
		if out := h.ok("exec", "dev", "cat", "/dev/shm/file"); out != "memory\n" || now.State != "RUNNING" || now.Problem != "" {
			t.Fatalf("%s: %q, %+v", when, out, now)
		}
	}
	for range 3 {
		h.killDaemon(h.daemonPID())
		h.startSystem()
		same("after a kill of the daemon")
	}
	h.endDaemon()
	unit := "banger-test-" + strconv.Itoa(os.Getpid()) + ".service"
	run := exec.Command("systemd-run", "--collect", "--unit="+unit)
	for _, v := range h.env {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "BANGER_") || name == "PATH" || name == "HOME" {
			run.Args = append(run.Args, "--setenv="+v)
		}
	}
	run.Args = append(run.Args, filepath.Join(binDir(t), "bangerd"), "--system")
	if out, err := run.CombinedOutput(); err != nil {
		t.Fatalf("systemd-run: %v\n%s", err, out)
	}
	waitFor(t, time.Minute, "the daemon in its unit to serve", func() bool { return h.try("daemon", "status").code == 0 })
	same("under the daemon in its unit")
	h.ok("stop", "dev")
	h.start("dev") // this one is forked in the unit
	h.ok("exec", "dev", "sh", "-c", "echo memory > /dev/shm/file")
	before = h.show("dev").Handles
	pid := h.daemonPID()
	if out, err := exec.Command("systemctl", "stop", unit).CombinedOutput(); err != nil {
		t.Fatalf("systemctl stop: %v\n%s", err, out)
	}
	waitFor(t, 30*time.Second, "the daemon to end", func() bool { return isZombie(pid) })
	h.startSystem()
	same("after systemctl stop")
}

// endDaemon asks the daemon to end, as systemd does, and waits until it has.
func (h *host) endDaemon() {
	h.t.Helper()
	pid := h.daemonPID()
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		h.t.Fatal(err)
	}
	waitFor(h.t, 30*time.Second, "the daemon to end", func() bool { return isZombie(pid) })
}

// A VMM that needs more memory than its group has ends, alone, and that is said.
func TestSystemOutOfMemory(t *testing.T) {
	h := newSystem(t)
	for _, name := range []string{"greedy", "other"} {
		h.makeBare(name, "512M")
		h.start(name)
	}
	other := h.show("other").Handles
	group := h.group("greedy")
	if limit := strings.TrimSpace(read(t, filepath.Join(group, "memory.max"))); limit == "max" {
		t.Errorf("the group's limit is %q", limit)
	}
	current := atoi(t, strings.TrimSpace(read(t, filepath.Join(group, "memory.current"))))
	if err := os.WriteFile(filepath.Join(group, "memory.max"), fmt.Append(nil, current+64<<20), 0); err != nil {
		t.Fatal(err)
	}
	r := h.try("exec", "-u", "root", "greedy", "sh", "-c", "mount -o remount,size=90% /dev/shm && dd if=/dev/zero of=/dev/shm/x bs=1M count=320")
	if r.code == 0 {
		t.Error("the guest has touched more than its limit")
	}
	waitFor(t, time.Minute, "the VM to be stopped", func() bool { return h.show("greedy").State == "STOPPED" })
	const why = "killed: the VMM needed more memory than its group has"
	if v := h.show("greedy"); v.Ended != why {
		t.Errorf("it has ended like this: %q", v.Ended)
	}
	for _, args := range [][]string{{"show", "greedy"}, {"ps", "--format", "json"}} {
		if out := h.ok(args...); !strings.Contains(out, "more memory") {
			t.Errorf("banger %s does not say why:\n%s", args[0], out)
		}
	}
	if v := h.show("other"); v.State != "RUNNING" || v.Handles["vmm pid"] != other["vmm pid"] || v.Handles["guest boot id"] != other["guest boot id"] {
		t.Errorf("the other: %+v", v)
	}
	h.ok("exec", "other", "true")
	h.ok("start", "greedy") // with the limit that it should have
	h.ok("exec", "greedy", "sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=200")
}

// group is the control group of a VM's VMM.
func (h *host) group(name string) string {
	h.t.Helper()
	v := h.show(name)
	_, path, _ := strings.Cut(strings.TrimSpace(read(h.t, "/proc/"+v.Handles["vmm pid"]+"/cgroup")), "::")
	if !strings.HasSuffix(path, v.ID+".scope/vmm") {
		h.t.Fatalf("the VMM of %s is in the group %q", name, path)
	}
	return "/sys/fs/cgroup" + path
}

// Two daemons with two state directories, each with VMs of the same names: what one does,
// also after a crash, does not touch what is the other's.
func TestSystemTwice(t *testing.T) {
	a, b := newSystem(t), newSystem(t)
	for _, h := range []*host{a, b} {
		h.makeBare("dev", "384M")
		h.start("dev")
		h.ok("exec", "dev", "sh", "-c", "echo "+h.show("dev").ID+" > /root/file && sync")
	}
	for range 2 {
		steady, was := b.show("dev"), strings.Join(b.held(), "\n")
		same := func(when string) {
			t.Helper()
			now := b.show("dev")
			for _, key := range []string{"shim pid", "vmm pid", "guest boot id", "disk device"} {
				if now.Handles[key] != steady.Handles[key] || now.Handles[key] == "" {
					t.Fatalf("%s, in the other: %s was %q, is %q", when, key, steady.Handles[key], now.Handles[key])
				}
			}
			if held := strings.Join(b.held(), "\n"); held != was {
				t.Fatalf("%s, the other holds\n%s\nand held\n%s", when, held, was)
			}
			if out := b.ok("exec", "dev", "cat", "/root/file"); out != steady.ID+"\n" {
				t.Fatalf("%s, in the other: %q", when, out)
			}
		}
		pid := a.daemonPID()
		kill(t, atoi(t, a.show("dev").Handles["shim pid"]))
		a.killDaemon(pid)
		a.startSystem()
		same("one VM and its daemon killed")
		a.wantFree("the VM and the daemon killed")
		a.ok("start", "dev")
		a.dieAt("stop/jail/release/before", "stop", "--timeout", "0s", "dev")
		a.startSystem()
		same("one daemon killed in a stop")
		a.wantFree("the daemon killed in a stop")
		a.ok("start", "dev")
		a.ok("rm", "-f", "dev")
		same("one VM removed")
		if left := a.leaks(); left != "" {
			t.Fatalf("removed, and left:\n%s", left)
		}
		a.makeBare("dev", "384M")
		a.ok("start", "dev")
		a.ok("exec", "dev", "sh", "-c", "echo "+a.show("dev").ID+" > /root/file && sync")
		a, b = b, a
	}
}

// TestSystemLifecycles makes, uses and removes VMs, 10 of them, and 200 in make soak: each
// leaves nothing, and the daemon does not grow.
func TestSystemLifecycles(t *testing.T) {
	h := newSystem(t)
	rounds := 10
	if soak() {
		rounds = 200
	}
	pid := h.daemonPID()
	var sizes []int
	for round := range rounds {
		h.ok("create", "--name", "dev", "--memory", "512M", "--cpus", "1", "--disk", "2G", "--ready", "agent")
		h.ok("exec", "-u", "root", "dev", "sh", "-c", "echo kept > /root/file && ln -sf /bin/true /usr/sbin/init && sync")
		h.ok("stop", "dev")
		h.wantFree(fmt.Sprintf("in round %d, stopped,", round))
		h.start("dev")
		if out := h.ok("exec", "dev", "cat", "/root/file"); out != "kept\n" {
			t.Fatalf("round %d: %q", round, out)
		}
		h.ok("rm", "-f", "dev")
		h.wantFree(fmt.Sprintf("in round %d, removed,", round))
		if left := h.leaks(); left != "" {
			t.Fatalf("round %d has left:\n%s", round, left)
		}
		sizes = append(sizes, rss(t, pid))
	}
	if h.daemonPID() != pid {
		t.Error("it is another daemon")
	}
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	t.Logf("the daemon has %d descriptors, and had after each round, in KiB: %v", len(fds), sizes)
	// The first rounds fill caches. Go gives memory back late, so half of the rest is
	// compared with the other half by its largest.
	early, late := highest(sizes[2:rounds/2+1]), highest(sizes[rounds/2+1:])
	if late > early+early/10+2<<10 {
		t.Errorf("the daemon has grown from %d to %d KiB", early, late)
	}
	if len(fds) > 40 {
		t.Errorf("the daemon has %d descriptors", len(fds))
	}
	var listed bytes.Buffer
	for _, fd := range fds {
		target, _ := os.Readlink(fd)
		fmt.Fprintln(&listed, target)
	}
	if strings.Contains(listed.String(), h.dir+"/vms/") {
		t.Errorf("the daemon has open:\n%s", listed.String())
	}
}

func highest(list []int) int {
	most := 0
	for _, n := range list {
		most = max(most, n)
	}
	return most
}
