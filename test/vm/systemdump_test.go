package vm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// patience is how long a start in the test host takes at most, when all is well.
const patience = 75 * time.Second

// start starts a VM. When that takes long, it says where the VMM and its guest are.
func (h *host) start(name string) {
	h.t.Helper()
	late := time.AfterFunc(patience, func() { logVMMs(h.t) })
	defer late.Stop()
	begun := time.Now()
	h.ok("start", name)
	h.t.Logf("%s started within %s", name, time.Since(begun).Round(100*time.Millisecond))
}

// logVMMs says what the threads of all VMMs wait for, how much they have run, and what KVM
// has counted, twice.
func logVMMs(t testing.TB) {
	for range 2 {
		for _, pid := range vmms() {
			var text strings.Builder
			tasks, _ := filepath.Glob("/proc/" + pid + "/task/*")
			for _, task := range tasks {
				fmt.Fprintf(&text, "%s %s", filepath.Base(task), firstLine(task+"/comm"))
				fmt.Fprintf(&text, " wchan %s, stat %s\n", firstLine(task+"/wchan"), firstLine(task+"/stat"))
				stack, _ := os.ReadFile(task + "/stack")
				text.Write(stack)
			}
			counts, _ := filepath.Glob("/sys/kernel/debug/kvm/" + pid + "-*/*")
			for _, count := range counts {
				if n := firstLine(count); n != "0" && n != "" {
					fmt.Fprintf(&text, "%s=%s ", filepath.Base(count), n)
				}
			}
			t.Logf("VMM %s:\n%s", pid, text.String())
		}
		time.Sleep(2 * time.Second) // so long is what is compared
	}
	for _, argv := range [][]string{{"dmsetup", "status"}, {"dmsetup", "info"}, {"losetup", "--list"}, {"dmesg"}} {
		out, _ := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		t.Logf("%v:\n%s", argv, out[max(0, len(out)-4000):])
	}
	os.WriteFile("/host/results/hang", nil, 0o600)
	time.Sleep(15 * time.Second)
}

func firstLine(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return line
}
