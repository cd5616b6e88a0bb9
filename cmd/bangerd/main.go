// Command bangerd is banger's daemon, with the programs that it runs inside: see
// package daemon.
package main

import (
	"embed"
	"io/fs"
	"os"

	"banger/internal/cli"
)

// embedded holds banger-shim, banger-guest and banger-net once they are built; before,
// a placeholder, so that go vet works in a fresh clone.
//
//go:embed all:programs
var embedded embed.FS

func main() {
	programs, err := fs.Sub(embedded, "programs")
	if err != nil {
		panic(err) // the name above is wrong
	}
	os.Exit(cli.DaemonMain(os.Args[1:], os.Stdout, os.Stderr, programs))
}
