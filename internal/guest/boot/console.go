package boot

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

// The intents, besides the verbs of a shutdown.
const intentFailed = "failed" // the boot has failed; the line before says why

// note leaves a line in the kernel's log, which stamps it.
func note(format string, args ...any) { kmsg("<6>", fmt.Sprintf(format, args...)) }

// warn leaves a line in the kernel's log and on the console.
func warn(err error) {
	kmsg("<4>", err.Error())
	console("banger: " + err.Error() + "\r\n")
}

func kmsg(level, line string) {
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer f.Close()
	// A log that is full of rate limits loses the line; nothing depends on it.
	_, _ = f.WriteString(level + "banger: " + line)
}

// console writes s to the console and waits until it has left the guest.
func console(s string) {
	f, err := os.OpenFile("/dev/console", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		f = os.Stdout // the kernel opened the console for init, before there was a /dev
	} else {
		defer f.Close()
	}
	_, _ = f.WriteString(s)
	_ = unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1) // tcdrain(3)
}

// fail ends a boot that cannot go on.
func fail(err error) {
	console("\r\nbanger: " + err.Error() + "\r\n")
	end(intentFailed)
}

// end writes the intent as the last line of the console and restarts the machine,
// which ends the VMM. It does not return. The file systems must be settled.
func end(intent string) {
	unix.Sync()
	within(5*time.Second, func() {
		// The kernel's own "Restarting system" would follow the intent.
		_ = os.WriteFile("/proc/sys/kernel/printk", []byte("0"), 0)
		console("\r\n" + wire.IntentPrefix + intent + "\r\n")
	})
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	console("banger: cannot restart: " + err.Error() + "\r\n")
	for {
		_ = unix.Pause()
	}
}

// within runs fn and gives up waiting for it after d.
func within(d time.Duration, fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn()
	}()
	select {
	case <-done:
	case <-time.After(d):
	}
}
