package qemuproc

import (
	"errors"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"banger/internal/daemon/kvm"
)

const (
	// tscAgree is how far apart the two sources may be, relative.
	tscAgree = 0.005
	// tscMeasure is how long is measured: an error of 1 µs at both ends is 0.01 %.
	tscMeasure = 20 * time.Millisecond
)

// hostTSC is the rate of the host's time stamp counter in kHz. Under TCG a guest's
// rdtsc reads the host's, so the rate is the guest's too.
//
// Two sources: a measurement against the monotonic clock, good to about 0.01 %, and
// the bogomips of /proc/cpuinfo, which the kernel takes from the rate it knows
// (lpj_fine in arch/x86/kernel/tsc.c: bogomips = kHz/500), good to 3 kHz. The latter is
// taken if the former agrees: bogomips can be something else, under lpj= and on
// hypervisors that say nothing of the TSC, and a guest given half the rate lives at
// double speed.
func hostTSC() (int64, error) {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return 0, err
	}
	return chooseTSC(bogomipsKHz(string(data)), measureTSC(tscMeasure))
}

// chooseTSC weighs the rates of the two sources in kHz, 0 for one that is not known.
func chooseTSC(bogomips, measured int64) (int64, error) {
	switch {
	case bogomips > 0 && measured > 0 && math.Abs(float64(bogomips-measured)) > tscAgree*float64(measured):
		return measured, nil
	case bogomips > 0:
		return bogomips, nil
	case measured > 0:
		return measured, nil
	}
	return 0, errors.New("cannot find the rate of the CPU's time stamp counter, without which a guest hangs")
}

// bogomipsKHz is 0 when there is no such line.
func bogomipsKHz(cpuinfo string) int64 {
	mips, err := strconv.ParseFloat(kvm.CPUField(cpuinfo, "bogomips"), 64)
	if err != nil || mips <= 0 || mips > 1e6 || !constantTSC(cpuinfo) {
		return 0
	}
	return int64(math.Round(mips * 500))
}

// constantTSC: without this flag the counter's rate follows the CPU's frequency.
func constantTSC(cpuinfo string) bool {
	for _, flag := range strings.Fields(kvm.CPUField(cpuinfo, "flags")) {
		if flag == "constant_tsc" {
			return true
		}
	}
	return false
}

// measureTSC counts ticks for d. It is 0 where the counter cannot be read.
func measureTSC(d time.Duration) int64 {
	ticks0, at0, ok := tickAt()
	if !ok {
		return 0
	}
	time.Sleep(d)
	ticks1, at1, _ := tickAt()
	elapsed := at1.Sub(at0)
	if ticks1 <= ticks0 || elapsed <= 0 {
		return 0
	}
	return int64(math.Round(float64(ticks1-ticks0) / (float64(elapsed) / float64(time.Millisecond))))
}

// tickAt reads both clocks. Of several readings it takes the one that was least
// interrupted, so that a busy host does not show in the result.
func tickAt() (ticks uint64, at time.Time, ok bool) {
	best := time.Duration(math.MaxInt64)
	for range 16 {
		before := time.Now()
		t, known := rdtsc()
		after := time.Now()
		if !known {
			return 0, time.Time{}, false
		}
		if gap := after.Sub(before); gap < best {
			best, ticks, at = gap, t, before.Add(gap/2)
		}
	}
	return ticks, at, true
}
