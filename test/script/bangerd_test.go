package script

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"banger/internal/cli"
	"banger/internal/daemon"
	"banger/internal/daemon/image/imagetest"
	"banger/internal/daemon/locks"
	"banger/internal/daemon/opstate"
)

// programsDir is, in the environment of a script, where buildPrograms put what bangerd
// runs.
const programsDir = "BANGER_TEST_PROGRAMS"

// withNetwork, when it is set for a script, gives the VMs of its fake host a network, of
// test/fakenet.
const withNetwork = "BANGER_TEST_NETWORK"

// When these are set for a script, they are a wish for the real host, or for the real
// making of images and kernels.
const (
	realHost   = "BANGER_TEST_REAL_HOST"
	realImages = "BANGER_TEST_REAL_IMAGES"
)

// bangerd is the real daemon, wired to the fake host that is kept in the directory
// ".host" beside the state directory.
func bangerd() int {
	state, programs := os.Getenv("BANGER_STATE_DIR"), os.Getenv(programsDir)
	var fakes []daemon.Option
	if os.Getenv(realHost) == "" {
		host := fakeHost(state, programs)
		host.Ability.Network = os.Getenv(withNetwork) != ""
		fakes = append(fakes, daemon.WithHost(host.Drivers()))
	}
	if os.Getenv(realImages) == "" {
		fakes = append(fakes, daemon.WithImageBuilder(&imagetest.Builder{Before: waitWhileHeld(state)}))
	}
	return cli.DaemonMain(os.Args[1:], os.Stdout, os.Stderr, os.DirFS(programs), append(fakes,
		daemon.WithChecker(locks.NewChecker()),
		daemon.WithAgentTimeout(agentTimeout()),
	)...)
}

// agentTimeout is short in the scripts that have guests which never answer.
func agentTimeout() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("BANGER_TEST_AGENT_TIMEOUT")); err == nil {
		return d
	}
	return time.Minute
}

// waitWhileHeld keeps a build from going on while there is a file "hold".
func waitWhileHeld(state string) func(context.Context, string, string, opstate.Progress) error {
	return func(ctx context.Context, _, _ string, _ opstate.Progress) error {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			if _, err := os.Stat(filepath.Join(state, "hold")); err != nil {
				return nil
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
}

// buildPrograms builds what bangerd runs on the fake host, for all scripts.
func buildPrograms(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, pkg := range map[string]string{"banger-shim": "banger/cmd/banger-shim", "fakevmm": "banger/test/fakevmm/ownroot", "fakevmm.real": "banger/test/fakevmm", "banger-net": "banger/test/fakenet"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(dir, name), pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("cannot build %s: %v\n%s", pkg, err, out)
		}
	}
	// No guest boots here; the initramfs is made of it all the same.
	if err := os.WriteFile(filepath.Join(dir, "banger-guest"), []byte("#!/bin/false\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}
