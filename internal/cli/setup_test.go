package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"banger/internal/config"
	"banger/test/need"
)

// setup runs banger as root with a state directory of the system's daemon.
func setup(t *testing.T, state string, args ...string) result {
	t.Helper()
	t.Setenv("BANGER_STATE_DIR", state)
	c := &call{t: t, stdin: strings.NewReader("")}
	c.start(append([]string{"setup", "firecracker"}, args...)...)
	code := c.wait()
	return result{code, c.out.String(), c.err.String()}
}

func TestSetupFirecrackerRefuses(t *testing.T) {
	need.Need(t, "root")
	state := filepath.Join(t.TempDir(), "state")
	if r := setup(t, state, "--undo", "--from", "x"); r.code != 2 {
		t.Errorf("both flags: %v", r)
	}
	if r := setup(t, state, "--from", "/no/such/file"); r.code != 3 || !strings.Contains(r.err, "/no/such/file") {
		t.Errorf("a missing file: %v", r)
	}
	r := setup(t, state, "--from", t.TempDir())
	if r.code == 0 || !strings.Contains(r.err, "has no firecracker") || r.out != "" {
		t.Errorf("an empty directory: %v", r)
	}
	if _, err := os.Stat(filepath.Join(state, "firecracker")); err == nil {
		t.Error("something was installed")
	}
	if left, err := os.ReadDir(filepath.Join(state, "cache")); err != nil || len(left) > 0 {
		t.Errorf("left in the cache: %v, %v", left, err)
	}
}

// --undo removes what setup installed, and makes and removes nothing else.
func TestSetupFirecrackerUndo(t *testing.T) {
	need.Need(t, "root")
	state := filepath.Join(t.TempDir(), "state")
	if r := setup(t, state, "--undo"); r.code != 0 {
		t.Errorf("nothing to undo: %v", r)
	}
	if _, err := os.Stat(state); err == nil {
		t.Error("--undo made the state directory")
	}

	program := filepath.Join(state, "firecracker", "firecracker")
	install := func() {
		if err := os.MkdirAll(filepath.Dir(program), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(program, nil, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	install() // in a directory that is somebody's
	if r := setup(t, state, "--undo"); r.code != 0 {
		t.Errorf("a directory of something else: %v", r)
	}
	if _, err := os.Stat(program); err != nil {
		t.Errorf("--undo took what setup did not make: %v", err)
	}
	if err := (config.Layout{Root: state}).MarkSystem(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if r := setup(t, state, "--undo"); r.code != 0 {
			t.Errorf("%v", r)
		}
		if _, err := os.Stat(filepath.Dir(program)); err == nil {
			t.Error("it is there after --undo")
		}
	}
}
