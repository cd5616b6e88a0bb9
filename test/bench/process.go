package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// cpuOf is the CPU seconds, user and system, that processes have used. Those that are
// gone count nothing: what matters is read while they live.
func cpuOf(pids ...int) float64 {
	total := 0.0
	for _, pid := range pids {
		// The clock of another process: CPUCLOCK_SCHED of its pid, see
		// include/linux/posix-timers.h. /proc/PID/stat counts in ticks of 10 ms.
		var ts unix.Timespec
		if unix.ClockGettime(int32(^pid<<3|2), &ts) == nil {
			total += float64(ts.Nano()) / 1e9
		}
	}
	return total
}

// cpuOfChildren is the CPU seconds of the children that a process has reaped, in ticks
// of 10 ms.
func cpuOfChildren(pid int) float64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	const cutime, cstime, ticks = 16 - 3, 17 - 3, 100 // fields 16 and 17, see proc(5)
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) <= cstime {
		return 0
	}
	user, _ := strconv.ParseFloat(fields[cutime], 64)
	system, _ := strconv.ParseFloat(fields[cstime], 64)
	return (user + system) / ticks
}

// cpuOfDaemon is that of a process together with its reaped children.
func cpuOfDaemon(pid int) float64 { return cpuOf(pid) + cpuOfChildren(pid) }

// cpuOfState is what a child that was waited for has used.
func cpuOfState(s *os.ProcessState) float64 {
	return (s.UserTime() + s.SystemTime()).Seconds()
}

// memoryOf is a figure of /proc/PID/status in MiB: "VmRSS" now, "VmHWM" at its peak.
func memoryOf(pid int, key string) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no %s", pid, key)
}

// pssOf is a figure of /proc/PID/smaps_rollup in MiB: "Pss", the memory of a process with
// shared pages by their share, or "Pss_Anon", what of it is in no file.
func pssOf(pid int, key string) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/smaps_rollup has no %s", pid, key)
}

// processesBelow finds what runs in or from dir: daemons, shims and VMMs.
func processesBelow(dir string) []int {
	var pids []int
	entries, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range entries {
		for _, link := range []string{"/cwd", "/exe"} {
			if target, err := os.Readlink(p + link); err == nil && strings.HasPrefix(target, dir+"/") {
				if pid, err := strconv.Atoi(filepath.Base(p)); err == nil && !isZombie(pid) {
					pids = append(pids, pid)
				}
				break
			}
		}
	}
	return pids
}

func isZombie(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && strings.Contains(string(data), ") Z ")
}

// gone waits until a process has ended.
func gone(pid int, limit time.Duration) bool {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) || isZombie(pid) {
			return true
		}
	}
	return false
}
