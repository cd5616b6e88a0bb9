package structure

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestGoIsNamed: who builds without Go, or with one that is too old, is told so, and
// nothing is built. Whatever else the machine lacks, nothing is installed here.
func TestGoIsNamed(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(root(), "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "\ngo ")
	version, _, _ := strings.Cut(rest, "\n")
	others := everyProgramBut(t, "go", "apt-get")
	for name, c := range map[string]struct{ program, want string }{
		"missing": {"", "and no go is in PATH: see https://go.dev/doc/install\n"},
		"old":     {`[ "$1 $2" = "env GOVERSION" ] && echo go1.19.8`, "and this is go 1.19.8: see https://go.dev/doc/install\n"},
	} {
		for _, target := range []string{"build", "demo"} {
			t.Run(name+"/"+target, func(t *testing.T) {
				bin := t.TempDir()
				used := filepath.Join(bin, "used")
				script(t, filepath.Join(bin, "apt-get"), "exit 1")
				if c.program != "" {
					script(t, filepath.Join(bin, "go"), c.program+` || { echo "go $*" >> "`+used+`"; exit 1; }`)
				}
				cmd := exec.CommandContext(t.Context(), "make", target)
				cmd.Dir, cmd.Env = root(), []string{"PATH=" + bin + ":" + others, "HOME=" + t.TempDir()}
				out, err := cmd.CombinedOutput()
				var exit *exec.ExitError
				if !errors.As(err, &exit) || !strings.Contains(string(out), "banger needs Go "+version+" or newer, "+c.want) {
					t.Errorf("make %s: %v\n%s", target, err, out)
				}
				if ran, err := os.ReadFile(used); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("it went on: %s (%v)", ran, err)
				}
			})
		}
	}
}

// everyProgramBut makes a directory of links to all programs of PATH but some.
func everyProgramBut(t *testing.T, but ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, from := range filepath.SplitList(os.Getenv("PATH")) {
		programs, err := os.ReadDir(from)
		if err != nil {
			continue
		}
		for _, p := range programs {
			if slices.Contains(but, p.Name()) {
				continue
			}
			if err := os.Symlink(filepath.Join(from, p.Name()), filepath.Join(dir, p.Name())); err != nil && !errors.Is(err, fs.ErrExist) {
				t.Fatal(err)
			}
		}
	}
	return dir
}

func script(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
}
