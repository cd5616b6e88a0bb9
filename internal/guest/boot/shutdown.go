package boot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// shutdownProgram is what systemd-shutdown(8) changes to at the very end, with the
// verb as an argument and the old root on oldRoot.
const (
	shutdownProgram = "/run/initramfs/shutdown"
	oldRoot         = "/oldroot"
)

// unitDir is where systemd looks for units of this boot.
const unitDir = "/run/systemd/system"

// prepareShutdown puts this program where systemd looks for it. The directories
// are those that systemd would otherwise have to make.
func prepareShutdown() error {
	dir := filepath.Dir(shutdownProgram)
	for _, d := range []string{"", "dev", "proc", "sys", "run", oldRoot[1:]} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return fmt.Errorf("cannot prepare the shutdown: %w", err)
		}
	}
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("cannot prepare the shutdown: %w", err)
	}
	defer self.Close()
	f, err := os.OpenFile(shutdownProgram, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return fmt.Errorf("cannot prepare the shutdown: %w", err)
	}
	defer f.Close()
	if _, err := io.Copy(f, self); err != nil {
		return fmt.Errorf("cannot prepare the shutdown: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("cannot prepare the shutdown: %w", err)
	}
	return nil
}

// maskGetty keeps systemd from starting a login on the console, without a trace on
// the disk: nobody can type there, its prompt would disturb the intent, and without
// udev in the image systemd waits for the console's device for 90 s.
func maskGetty() error {
	if err := os.MkdirAll(unitDir, 0o755); err != nil {
		return fmt.Errorf("cannot mask the console's login: %w", err)
	}
	if err := os.Symlink("/dev/null", filepath.Join(unitDir, "serial-getty@.service")); err != nil {
		return fmt.Errorf("cannot mask the console's login: %w", err)
	}
	return nil
}

// catchKeys makes the kernel send Ctrl-Alt-Del to PID 1, as systemd has it too: its own
// answer is a restart on the spot. Where a VMM has no power button, these keys are what it
// has to stop a guest with, and nobody else can press them; so here they mean poweroff.
func catchKeys() error {
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF); err != nil {
		return fmt.Errorf("cannot catch Ctrl-Alt-Del: %w", err)
	}
	return nil
}

// keysPowerOff makes systemd power off on Ctrl-Alt-Del, where it would reboot, unless the
// image's owner has said what it does, in /etc.
func keysPowerOff() error {
	for _, dir := range []string{"/usr/lib/systemd/system", "/lib/systemd/system"} {
		target := filepath.Join(dir, "poweroff.target")
		if _, err := os.Stat(target); err != nil {
			continue
		}
		if err := os.MkdirAll(unitDir, 0o755); err != nil {
			return fmt.Errorf("cannot set what Ctrl-Alt-Del does: %w", err)
		}
		if err := os.Symlink(target, filepath.Join(unitDir, "ctrl-alt-del.target")); err != nil {
			return fmt.Errorf("cannot set what Ctrl-Alt-Del does: %w", err)
		}
		return nil
	}
	return errors.New("cannot set what Ctrl-Alt-Del does: systemd has no poweroff.target")
}

// shutdownMain is PID 1 after systemd's.
func shutdownMain(args []string) { finish(intentOf(args[1:]), oldRoot) }

// intentOf finds the verb among the arguments that systemd-shutdown hands on. The
// VMM knows no other end than these three.
func intentOf(args []string) string {
	for _, a := range args {
		switch a {
		case "poweroff", "reboot", "halt":
			return a
		case "kexec", "soft-reboot":
			return "reboot"
		case "exit":
			return "halt"
		}
	}
	return "poweroff"
}

// finish kills what is left, settles the file systems below root and ends the
// guest. A file system that hangs does not keep it alive.
func finish(intent, root string) {
	_ = unix.Kill(-1, unix.SIGKILL)
	deadline := time.Now().Add(killWait)
	for time.Now().Before(deadline) {
		if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err == unix.ECHILD {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	within(20*time.Second, func() {
		unix.Sync()
		settle(root)
	})
	end(intent)
}

// settle unmounts what is mounted below root, the newest first, and makes
// read-only what is still in use: the root itself, at least.
func settle(root string) {
	for range 3 { // what a busy mount was busy with may be gone on the second round
		info, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return
		}
		busy := false
		for _, m := range settleOrder(string(info), root) {
			if m != "/" && unix.Unmount(m, 0) == nil {
				continue
			}
			busy = true
			_ = unix.Mount("", m, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
		}
		if !busy {
			return
		}
	}
}

// settleOrder lists the mount points at and below root that hold file systems, in
// the order of unmounting, from the content of /proc/self/mountinfo.
func settleOrder(mountinfo, root string) []string {
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`) // see proc(5)
	var points []string
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		fields, rest := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 6 || len(rest) < 1 {
			continue
		}
		point := unescape.Replace(fields[4])
		if point != root && !strings.HasPrefix(point, strings.TrimSuffix(root, "/")+"/") {
			continue
		}
		switch rest[0] {
		case "proc", "sysfs", "devtmpfs", "devpts", "rootfs", "cgroup2", "mqueue":
			if root == "/" {
				continue // needed until the end
			}
		}
		points = append([]string{point}, points...)
	}
	return points
}
