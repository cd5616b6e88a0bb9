// Command banger-net carries the network of one VM: see package netstack. The VM's shim
// starts it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"banger/internal/netstack"
)

// The collector runs early, and all the time once memory is short: an idle VM should cost
// little, and a guest must not make this process large.
const (
	gcPercent   = 50
	memoryLimit = 44 << 20 // bytes
)

func main() {
	// The name of a program that was started by descriptor is a number.
	_ = os.WriteFile("/proc/self/comm", []byte("banger-net"), 0)
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryLimit)
	syscall.Umask(0o077)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := netstack.Run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "banger-net:", err)
		os.Exit(1)
	}
}
