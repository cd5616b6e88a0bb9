package fcproc

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// pair puts two programs into a directory; empty ones are left out.
func pair(t *testing.T, fc, jl []byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range map[string][]byte{firecracker: fc, jailer: jl} {
		if len(data) == 0 {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// What is wrong with the programs is said, with what mends it.
func TestProgramsRefused(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	t.Setenv(DirEnv, "")
	fake := func(version string) []byte { return fakeProgram(t, version) }
	other := fake(Tested)
	other[18] = 183 // e_machine of ELF: EM_AARCH64
	for _, c := range []struct{ name, dir, words string }{
		{"none", t.TempDir(), "is not installed"},
		{"one of two", pair(t, fake(Tested), nil), "both are needed"},
		{"two versions", pair(t, fake(Tested), fake("1.13.0")), "1.13.0"},
		{"a script", pair(t, []byte("#!/bin/sh\necho Firecracker v1.12.1\n"), fake(Tested)), "is no program"},
		{"another machine", pair(t, other, fake(Tested)), "another machine"},
		{"something else", pair(t, fake(Tested), fake("new")), "is no Jailer"},
		{"too old", pair(t, fake("1.7.0"), fake("1.7.0")), "1.8 is the oldest"},
	} {
		_, err := New(c.dir).programs(t.Context())
		if err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want %q", c.name, err, c.words)
		}
		if got := Remedy(err); got != "sudo banger setup firecracker" {
			t.Errorf("%s: the remedy is %q", c.name, got)
		}
	}
	t.Setenv(DirEnv, "/opt")
	_, err := New(t.TempDir()).programs(t.Context())
	if got := Remedy(err); got != "unset "+DirEnv {
		t.Errorf("with %s the remedy is %q", DirEnv, got)
	}
	if got := Remedy(errors.New("something else")); strings.Contains(got, "setup firecracker") || got == "" {
		t.Errorf("another error's remedy is %q", got)
	}
}

func TestProgramsFound(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	first, second := pair(t, fakeProgram(t, "1.14.2"), fakeProgram(t, "1.14.2")), pair(t, fakeProgram(t, Tested), fakeProgram(t, Tested))
	if s, err := New(t.TempDir(), first, second).programs(t.Context()); err != nil || s.Version != "1.14.2" {
		t.Errorf("the first that has them: %+v, %v", s, err)
	}
	// A link called firecracker, as packagers make it: the jail has the file's name.
	linked := t.TempDir()
	name := "firecracker-v1.12.1-x86_64"
	err := errors.Join(
		os.Rename(filepath.Join(second, firecracker), filepath.Join(second, name)),
		os.Symlink(filepath.Join(second, name), filepath.Join(linked, firecracker)),
		os.Symlink(filepath.Join(second, jailer), filepath.Join(linked, jailer)))
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", linked)
	// Two names for one program, of which the fake goes by the one that it is called.
	s, err := New().find()
	if err != nil || s.jailName() != name {
		t.Errorf("a link: %+v, %v", s, err)
	}
	// The jailer wants its word in the name.
	vmm := filepath.Join(second, "vmm")
	if err := errors.Join(os.Rename(s.Firecracker, vmm), os.Remove(filepath.Join(linked, firecracker)), os.Symlink(vmm, filepath.Join(linked, firecracker))); err != nil {
		t.Fatal(err)
	}
	if _, err := New().programs(t.Context()); err == nil || !strings.Contains(err.Error(), "another name") {
		t.Errorf("another name: %v", err)
	}
}

func TestRecent(t *testing.T) {
	for version, want := range map[string]bool{
		"1.12.1": true, "1.8.0": true, "2.0.0": true, "1.17.0-dev": true, "1.7.9": false, "0.25.2": false, "": false, "1.99999999999999999999.0": false,
	} {
		if got := recent(version); got != want {
			t.Errorf("%q: %v", version, got)
		}
	}
}

// What was downloaded is not run before it is known.
func TestDownloadIsNotRun(t *testing.T) {
	dir := pair(t, bytes.Repeat([]byte("x"), 100), bytes.Repeat([]byte("y"), 100))
	_, err := inspect(t.Context(), dir, true)
	if err == nil || !strings.Contains(err.Error(), "checksums") {
		t.Errorf("%v", err)
	}
}
