// Command banger-shim supervises one VM, see package shim. The daemon starts it;
// by hand it does nothing.
package main

import (
	"os"
	"runtime"

	"banger/internal/shim"
)

// In init, so that main stays on the process's first thread.
func init() { runtime.LockOSThread() }

func main() { os.Exit(shim.Main()) }
