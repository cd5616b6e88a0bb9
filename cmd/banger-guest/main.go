// Command banger-guest is init and agent of a guest, see packages boot and agent.
// It is built without cgo, for it runs without a C library.
package main

import (
	"os"
	"runtime"

	"banger/internal/guest/agent"
	"banger/internal/guest/boot"
	"banger/internal/guest/wire"
)

func main() {
	agent.RunChild()
	os.Exit(boot.Main(os.Args, serve))
}

func serve(cfg wire.Config, system *boot.System, port string) error {
	// Goroutines that wake each other across the guest's CPUs cost more than they gain:
	// with one less an exec is 7 % faster, and takes 16 % less of QEMU's CPU time.
	runtime.GOMAXPROCS(1)
	a := agent.New(agent.Options{Config: cfg, System: system})
	if cfg.Vsock {
		l, err := agent.ListenVsock()
		if err != nil {
			return err
		}
		return a.ServeVsock(l)
	}
	p, err := agent.OpenPort(port)
	if err != nil {
		return err
	}
	return a.Serve(p)
}
