package qemuproc

// readTSC is the instruction RDTSC.
//
//go:noescape
func readTSC() uint64

func rdtsc() (ticks uint64, ok bool) { return readTSC(), true }
