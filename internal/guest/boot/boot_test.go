package boot

import (
	"encoding/binary"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

func TestDiskBySerial(t *testing.T) {
	sys := testImage(t, map[string]string{
		"vda/serial": "modules", "vdb/serial": "root\n", "vdc/size": "8", "vdd/serial": "", "sda/serial": "other",
	})
	for serial, want := range map[string]string{"modules": "vda", "root": "vdb", "roo": "", "other": "", "none": ""} {
		got, err := diskBySerial(sys, serial)
		if got != want || err != nil {
			t.Errorf("diskBySerial(%q) = %q, %v, want %q", serial, got, err, want)
		}
	}
	if got, err := diskBySerial(sys, ""); err == nil {
		t.Errorf("no serial found %q", got)
	}
}

// Where disks bear no serials they go by virtio's numbers, not by their letters, and none
// is named before all have come.
func TestDiskName(t *testing.T) {
	cfg := wire.Config{DiskOrder: []string{"root", "modules"}}
	sys := testImage(t, map[string]string{
		"vda/device": "->../../virtio10", "vda/serial": "root", "vdb/device": "->../../virtio9", "sda/device": "->../../virtio1",
		"vdc/serial": "extra",
	})
	for serial, want := range map[string]string{"root": "vdb", "modules": "vda", "extra": "vdc", "none": ""} {
		if got, err := diskName(cfg, sys, serial); got != want || err != nil {
			t.Errorf("diskName(%q) = %q, %v, want %q", serial, got, err, want)
		}
	}
	if got, err := diskName(wire.Config{}, sys, "root"); got != "vda" || err != nil {
		t.Errorf("by its serial: %q, %v", got, err)
	}
	for name, files := range map[string]map[string]string{
		"nothing":                {},
		"one":                    {"vda/device": "->../../virtio0"},
		"another kind of device": {"vda/device": "->../../virtio0", "vdb/device": "->../../0:0:0:0"},
	} {
		if got, err := diskName(cfg, testImage(t, files), "root"); got != "" || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestPortByName(t *testing.T) {
	class := testImage(t, map[string]string{"vport1p0/size": "", "vport1p1/name": "other\n", "vport1p2/name": "banger.agent\n"})
	if got := portByName(class, "banger.agent"); got != "vport1p2" {
		t.Errorf("portByName = %q", got)
	}
	if got := portByName(class, "banger"); got != "" {
		t.Errorf("portByName of no port = %q", got)
	}
}

func TestUeventsWait(t *testing.T) {
	// A socket pair stands for the kernel's: what is waited on is "readable".
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	u := &uevents{fd: fds[0]}
	asked := 0
	err = u.wait(10*time.Second, func() (bool, error) {
		if asked++; asked < 4 {
			// Three events make one reason to look again.
			for range 3 {
				if _, err := unix.Write(fds[1], []byte("add@/devices/virtio1")); err != nil {
					return false, err
				}
			}
		}
		return asked == 4, nil
	})
	if err != nil || asked != 4 {
		t.Errorf("asked %d times, %v", asked, err)
	}
	asked = 0
	if err := u.wait(20*time.Millisecond, func() (bool, error) { asked++; return false, nil }); err == nil {
		t.Error("what never came was found")
	}
	if asked > 3 {
		t.Errorf("without events it asked %d times", asked)
	}
}

func superblock(blocks uint64, log uint32, wide bool) []byte {
	s := make([]byte, ext4SuperLen)
	binary.LittleEndian.PutUint32(s[4:], uint32(blocks))
	binary.LittleEndian.PutUint32(s[0x18:], log)
	binary.LittleEndian.PutUint16(s[0x38:], 0xEF53)
	binary.LittleEndian.PutUint32(s[0x150:], uint32(blocks>>32))
	if wide {
		binary.LittleEndian.PutUint32(s[0x60:], 0x80)
	}
	return s
}

func TestExt4Size(t *testing.T) {
	for _, tt := range []struct {
		super        []byte
		blocks, size uint64
	}{
		{superblock(262144, 2, true), 262144, 4096},
		{superblock(65536, 0, false), 65536, 1024},
		{superblock(5<<32|7, 2, true), 5<<32 | 7, 4096},
		{superblock(5<<32|7, 2, false), 7, 4096},
	} {
		blocks, size, err := ext4Size(tt.super)
		if blocks != tt.blocks || size != tt.size || err != nil {
			t.Errorf("ext4Size = %d, %d, %v, want %d, %d", blocks, size, err, tt.blocks, tt.size)
		}
	}
	for name, super := range map[string][]byte{
		"zeroes": make([]byte, ext4SuperLen), "short": superblock(1, 2, true)[:512], "absurd block size": superblock(1, 40, true),
	} {
		if _, _, err := ext4Size(super); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if ext4ResizeFS != 0x40086610 { // as strace shows it for resize2fs
		t.Errorf("EXT4_IOC_RESIZE_FS = %#x", ext4ResizeFS)
	}
}

func TestCorrectClock(t *testing.T) {
	host := time.Unix(1_700_000_000, 0)
	up := 2 * time.Second
	for _, tt := range []struct {
		off   time.Duration
		wrong bool
	}{
		{0, false}, {-900 * time.Millisecond, false}, {-1100 * time.Millisecond, true}, {-time.Hour, true},
		{30 * time.Second, false}, {61 * time.Second, true}, {2 * time.Hour, true},
	} {
		want, wrong := correctClock(host.Add(up+tt.off), host, up)
		if wrong != tt.wrong || !want.Equal(host.Add(up)) {
			t.Errorf("%v off: %v, %v", tt.off, want, wrong)
		}
	}
}

func TestVerbOf(t *testing.T) {
	for sig, want := range map[syscall.Signal]string{
		38: "poweroff", 39: "reboot", 37: "halt", syscall.SIGUSR2: "poweroff", syscall.SIGTERM: "reboot", syscall.SIGUSR1: "halt",
		syscall.SIGINT: "poweroff", syscall.SIGHUP: "", syscall.SIGCHLD: "", 40: "",
	} {
		if got := verbOf(sig); got != want {
			t.Errorf("verbOf(%d) = %q, want %q", sig, got, want)
		}
	}
}

func TestShutdownVerbs(t *testing.T) {
	for _, verb := range []string{"poweroff", "reboot", "halt"} {
		sig, err := signalOf(verb)
		if err != nil || verbOf(sig) != verb {
			t.Errorf("signalOf(%q) = %d, %v, which asks for %q", verb, sig, err, verbOf(sig))
		}
	}
	for _, verb := range []string{"kexec", "", "Poweroff"} {
		if err := new(System).Shutdown(verb); err == nil {
			t.Errorf("the verb %q was accepted", verb)
		}
	}
}

func TestIntentOf(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"reboot", "--timeout", "90s"}, "reboot"},
		{[]string{"--log-level", "6", "poweroff"}, "poweroff"},
		{[]string{"halt"}, "halt"}, {[]string{"kexec"}, "reboot"}, {[]string{"exit"}, "halt"}, {nil, "poweroff"},
	} {
		if got := intentOf(tt.args); got != tt.want {
			t.Errorf("intentOf(%q) = %q, want %q", tt.args, got, tt.want)
		}
	}
}

func TestSettleOrder(t *testing.T) {
	const info = `21 1 254:16 / / rw,relatime shared:1 - ext4 /dev/vdb rw
22 21 0:19 / /proc rw - proc proc rw
23 21 0:5 / /dev rw - devtmpfs devtmpfs rw
24 23 0:20 / /dev/pts rw - devpts devpts rw
25 21 254:0 / /usr/lib/modules/6.1 ro - ext4 /dev/vda ro
26 21 0:40 / /mnt/a\040b rw,relatime master:2 - tmpfs tmpfs rw
27 26 0:41 / /mnt/a\040b/c rw - overlay overlay rw
28 21 0:42 / /mnt2 rw - tmpfs tmpfs rw
broken line
29 21
`
	if got, want := settleOrder(info, "/"), []string{"/mnt2", "/mnt/a b/c", "/mnt/a b", "/usr/lib/modules/6.1", "/"}; !slices.Equal(got, want) {
		t.Errorf("below /: %q, want %q", got, want)
	}
	if got, want := settleOrder(info, "/mnt"), []string{"/mnt/a b/c", "/mnt/a b"}; !slices.Equal(got, want) {
		t.Errorf("below /mnt: %q, want %q", got, want)
	}
	if got, want := settleOrder(info, "/dev"), []string{"/dev/pts", "/dev"}; !slices.Equal(got, want) {
		t.Errorf("below /dev: %q, want %q", got, want)
	}
}

func TestIsUserProcess(t *testing.T) {
	for stat, want := range map[string]bool{
		"100 (bash) S 1 100 100 0": true,
		"100 (a) b) (c) R 50 1":    true,
		"2 (kthreadd) S 0 0 0":     false,
		"30 (kworker/0:1) I 2 0 0": false,
		"101 (dead) Z 1 1":         false,
		"102 (x) Z) S 1 1":         true,
		"104 (a) Z 1) S 1 1":       true,
		"105 (a) S 1) S 2 0":       false,
		"garbage":                  false,
		"103 (x)":                  false,
		"":                         false,
	} {
		if got := isUserProcess(stat); got != want {
			t.Errorf("isUserProcess(%q) = %v", stat, got)
		}
	}
	if stat, err := os.ReadFile("/proc/self/stat"); err != nil || !isUserProcess(string(stat)) {
		t.Errorf("this process is none: %q, %v", stat, err)
	}
	if slices.Contains(userProcesses(os.Getpid()), os.Getpid()) {
		t.Error("an excepted process is listed")
	}
}
