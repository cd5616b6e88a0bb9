package config

import (
	"os"
	"path/filepath"
	"testing"

	"banger/api"
)

// A mistyped BANGER_STATE_DIR must not take over somebody's directory, nor change its
// mode; what a killed daemon left of a new one is taken up.
func TestPrepareForeign(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "thesis.tex")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	l := Layout{Root: dir}
	if err := l.Prepare(); api.CodeOf(err) != api.Refused {
		t.Fatalf("a directory with a thesis: %v", err)
	}
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("its mode is %v, %v", info.Mode(), err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("it holds %v, %v", entries, err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"bangerd.log.1", "banger.db-wal", "vms"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	os.Remove(filepath.Join(dir, "vms"))
	if err := l.Prepare(); err != nil {
		t.Fatalf("half a state directory: %v", err)
	}
	if _, err := l.Instance(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := l.Prepare(); err != nil {
		t.Fatalf("a file beside an instance: %v", err)
	}
}
