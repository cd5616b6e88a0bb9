// Package host shows that the test host is the machine that the other tests take it for:
// each thing that they need is done once, with nothing of banger's.
package host

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"banger/test/need"
)

func sh(t *testing.T, script string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script)
	cmd.Dir = t.TempDir()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s\nof: %s", err, out, script)
	}
	return strings.TrimSpace(string(out))
}

func TestKVM(t *testing.T) {
	need.Need(t, "testhost")
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const getVersion, createVM, createVCPU = 0xAE00, 0xAE01, 0xAE41 // linux/kvm.h
	if version, err := unix.IoctlRetInt(int(f.Fd()), getVersion); err != nil || version != 12 {
		t.Fatalf("API version %d, %v", version, err)
	}
	vm, err := unix.IoctlRetInt(int(f.Fd()), createVM)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(vm)
	vcpu, err := unix.IoctlRetInt(vm, createVCPU)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(vcpu)
	if flags := sh(t, "grep -m1 ^flags /proc/cpuinfo"); !strings.Contains(flags, " svm ") {
		t.Error("the processor has no svm")
	}
}

// TestSnapshot writes to a dm-snapshot, takes it away and back again: the writes are
// there, and the base has not changed.
func TestSnapshot(t *testing.T) {
	need.Need(t, "testhost")
	got := sh(t, `
		truncate -s 64M base; mkfs.ext4 -q base; truncate -s 32M cow; mkdir m
		before=$(sha256sum < base)
		b=$(losetup -f --show -r base); c=$(losetup -f --show cow)
		gone() { umount m 2>/dev/null || :; dmsetup remove smoke 2>/dev/null || :; losetup -d $b $c 2>/dev/null || :; }
		trap gone EXIT
		for round in 1 2; do
			dmsetup create smoke --table "0 $(blockdev --getsz $b) snapshot $b $c PO 8"
			mount /dev/mapper/smoke m; echo $round >> m/rounds
			[ $round = 1 ] || cat m/rounds
			umount m; dmsetup remove smoke
		done
		[ "$before" = "$(sha256sum < base)" ] && echo same`)
	if got != "1\n2\nsame" {
		t.Errorf("got %q", got)
	}
	if left := sh(t, "dmsetup ls; losetup -a"); left != "No devices found" {
		t.Errorf("left: %s", left)
	}
}

func TestScope(t *testing.T) {
	need.Need(t, "testhost")
	if one := sh(t, "cat /proc/1/comm; systemctl is-system-running --wait"); one != "systemd\nrunning" {
		t.Errorf("process 1 and its state: %s", one)
	}
	got := sh(t, `systemd-run --quiet --scope -p Delegate=yes --unit=smoke.scope bash -euc '
		d=/sys/fs/cgroup$(sed s/^0::// /proc/self/cgroup); echo ${d##*/}; cat $d/cgroup.controllers
		mkdir $d/leaf; echo $$ > $d/leaf/cgroup.procs; echo "+memory +cpu" > $d/cgroup.subtree_control
		echo 64M > $d/leaf/memory.max; cat $d/leaf/memory.max'`)
	lines := strings.Split(got, "\n")
	if len(lines) != 3 || lines[0] != "smoke.scope" || !strings.Contains(lines[1], "memory") || lines[2] != "67108864" {
		t.Errorf("got %q", got)
	}
}

func TestFirecracker(t *testing.T) {
	need.Need(t, "testhost")
	for program, want := range map[string]string{"firecracker": "Firecracker v1.12.1", "jailer": "Jailer v1.12.1"} {
		path := filepath.Join(os.Getenv("BANGER_FIRECRACKER_DIR"), program)
		if out := sh(t, path+" --version"); !strings.HasPrefix(out, want) {
			t.Errorf("%s --version: %s", program, out)
		}
	}
}

// TestShares: the cache and the tree are read, not written; results are written; what
// tests make is on a local disk.
func TestShares(t *testing.T) {
	need.Need(t, "testhost")
	for _, path := range []string{"/host/tree/x", "/host/cache/x"} {
		if err := os.WriteFile(path, nil, 0o600); err == nil {
			t.Errorf("%s can be written", path)
		}
	}
	if err := os.WriteFile("/host/results/smoke", []byte("written inside\n"), 0o644); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat("/host/cache/firecracker"); err != nil {
		t.Error(err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(t.TempDir(), &fs); err != nil || fs.Type != unix.EXT4_SUPER_MAGIC && fs.Type != unix.XFS_SUPER_MAGIC {
		t.Errorf("temporary files are on %#x, %v", fs.Type, err)
	}
	if out := sh(t, "ip -o link | wc -l"); out != "1" {
		t.Errorf("the test host has a network: %s interfaces", out)
	}
}

// TestReboot leaves a service that notes its orderly end. After a clean reboot the note
// is there, after a power cut it is not, and what was synced always is.
func TestReboot(t *testing.T) {
	need.Need(t, "reboot")
	const dir = "/var/lib/smoke"
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	if os.Getenv("BANGER_TEST_BOOT") == "1" {
		sh(t, fmt.Sprintf(`mkdir %[1]s; echo %[2]s > %[1]s/boot; echo lost > /root/lost; sync
			systemd-run --quiet --unit=smoke -p 'ExecStop=touch %[1]s/stopped' sleep infinity`, dir, strings.TrimSpace(string(bootID))))
		return
	}
	before, err := os.ReadFile(dir + "/boot")
	if err != nil {
		t.Fatal(err)
	}
	if string(before) == string(bootID) {
		t.Error("there was no reboot")
	}
	_, err = os.Stat(dir + "/stopped")
	if orderly := os.Getenv("BANGER_TEST_REBOOT") == "orderly"; orderly != (err == nil) {
		t.Errorf("orderly %v, and the note of the service: %v", orderly, err)
	}
	if _, err := os.Stat("/root/lost"); err == nil {
		t.Error("the root disk remembers; only /var/lib should")
	}
}
