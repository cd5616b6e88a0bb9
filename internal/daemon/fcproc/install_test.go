package fcproc

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"banger/api"
	"banger/internal/guest/wire"
)

// The test binary, with a version appended, plays both programs.
const versionMark = "\nversion of the fake: "

func TestMain(m *testing.M) {
	if _, err := os.Stat(wire.ConfigPath); err == nil && os.Getpid() == 1 {
		for { // the init of TestConformance's guest
			time.Sleep(time.Hour)
		}
	}
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		self, err := os.ReadFile(os.Args[0])
		if err != nil {
			panic(err)
		}
		i := bytes.LastIndex(self, []byte(versionMark))
		name := map[bool]string{true: "Firecracker", false: "Jailer"}[filepath.Base(os.Args[0]) == firecracker]
		fmt.Printf("%s v%s\n\nmore\n", name, self[i+len(versionMark):])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func fakeProgram(t testing.TB, version string) []byte {
	t.Helper()
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	return append(self, versionMark+version...)
}

// archive packs files as a release does.
func archive(t testing.TB, files map[string][]byte) string {
	t.Helper()
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.NoCompression)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		data := files[name]
		h := &tar.Header{Name: name, Mode: 0o755, Size: int64(len(data)), Typeflag: tar.TypeReg}
		if data == nil {
			h.Typeflag, h.Linkname = tar.TypeSymlink, "/bin/sh"
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "release.tgz")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

type place struct {
	t            *testing.T
	dir, scratch string
}

func newPlace(t *testing.T) place {
	root := t.TempDir()
	p := place{t, filepath.Join(root, "firecracker"), filepath.Join(root, "cache")}
	if err := os.Mkdir(p.scratch, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left, err := os.ReadDir(p.scratch); err != nil || len(left) > 0 {
			t.Errorf("left in the cache: %v, %v", left, err)
		}
	})
	return p
}

func (p place) install(from string) (string, error) {
	return Install(p.t.Context(), p.dir, p.scratch, from, func(string) {})
}

func (p place) holds(version string) {
	p.t.Helper()
	s, err := New(p.dir).find()
	if err != nil {
		p.t.Fatal(err)
	}
	for program, name := range map[string]string{s.Firecracker: "Firecracker", s.Jailer: "Jailer"} {
		got, err := versionOf(p.t.Context(), program, name)
		if err != nil || got != version {
			p.t.Errorf("%s has version %q, %v; want %s", program, got, err, version)
		}
	}
}

func TestInstall(t *testing.T) {
	p := newPlace(t)
	first := map[string][]byte{
		"release-v1.13.0-x86_64/firecracker-v1.13.0-x86_64":       fakeProgram(t, "1.13.0"),
		"release-v1.13.0-x86_64/firecracker-v1.13.0-x86_64.debug": []byte("symbols"),
		"release-v1.13.0-x86_64/jailer-v1.13.0-x86_64":            fakeProgram(t, "1.13.0"),
		"release-v1.13.0-x86_64/LICENSE":                          []byte("text"),
		"release-v1.13.0-x86_64/link/firecracker":                 nil,
	}
	if v, err := p.install(archive(t, first)); err != nil || v != "1.13.0" {
		t.Fatalf("%q, %v", v, err)
	}
	p.holds("1.13.0")

	second := t.TempDir()
	for _, name := range []string{firecracker, jailer} {
		if err := os.WriteFile(filepath.Join(second, name), fakeProgram(t, "1.14.2"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if v, err := p.install(second); err != nil || v != "1.14.2" {
		t.Fatalf("over the first: %q, %v", v, err)
	}
	p.holds("1.14.2")

	// What fails leaves what is there.
	if _, err := p.install("/no/such/file"); api.CodeOf(err) != api.NotFound {
		t.Errorf("a missing file: %v", err)
	}
	p.holds("1.14.2")
	if err := Uninstall(p.dir); err != nil {
		t.Fatal(err)
	}
	if _, err := New(p.dir).find(); err == nil && !strings.Contains(os.Getenv("PATH"), "firecracker") {
		t.Error("it is there after its removal")
	}
	if err := Uninstall(p.dir); err != nil {
		t.Errorf("the second time: %v", err)
	}
}

func TestInstallRefuses(t *testing.T) {
	fc, jl := fakeProgram(t, "1.13.0"), fakeProgram(t, "1.13.0")
	whole := archive(t, map[string][]byte{"a/firecracker": fc, "a/jailer": jl})
	data, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	cut := filepath.Join(t.TempDir(), "cut.tgz")
	if err := os.WriteFile(cut, data[:len(data)-1000], 0o600); err != nil {
		t.Fatal(err)
	}
	other := bytes.Clone(fc)
	other[18] = 183 // e_machine of ELF: EM_AARCH64
	for _, c := range []struct{ name, from, words string }{
		{"no archive", "/etc/passwd", "cannot read"},
		{"cut off", cut, "cannot read"},
		{"no jailer", archive(t, map[string][]byte{"a/firecracker": fc}), "has no jailer"},
		{"two of one", archive(t, map[string][]byte{"a/firecracker": fc, "b/firecracker": fc, "a/jailer": jl}), "two of firecracker"},
		{"a link", archive(t, map[string][]byte{"a/firecracker": nil, "a/jailer": jl}), "has no firecracker"},
		{"no program", archive(t, map[string][]byte{"a/firecracker": []byte("#!/bin/sh\n"), "a/jailer": jl}), "no program"},
		{"another machine", archive(t, map[string][]byte{"a/firecracker": other, "a/jailer": jl}), "another machine"},
		{"two versions", archive(t, map[string][]byte{"a/firecracker": fc, "a/jailer": fakeProgram(t, "1.12.0")}), "1.13.0 and jailer of 1.12.0"},
		{"no version", archive(t, map[string][]byte{"a/firecracker": fakeProgram(t, "new"), "a/jailer": jl}), "no Firecracker"},
		{"forged", archive(t, map[string][]byte{"a/firecracker": fakeProgram(t, Tested), "a/jailer": fakeProgram(t, Tested)}), "checksums"},
		{"a device", os.DevNull, "no file and no directory"},
		{"an empty directory", t.TempDir(), "has no firecracker"},
	} {
		p := newPlace(t)
		_, err := p.install(c.from)
		if err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want %q", c.name, err, c.words)
		}
		if _, err := os.Stat(p.dir); err == nil {
			t.Errorf("%s: something was installed", c.name)
		}
	}
}

// An end in the middle leaves nothing.
func TestInstallCancelled(t *testing.T) {
	p := newPlace(t)
	from := archive(t, map[string][]byte{"a/firecracker": fakeProgram(t, "1.13.0"), "a/jailer": fakeProgram(t, "1.13.0")})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Install(ctx, p.dir, p.scratch, from, func(string) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if err := put(ctx, p.scratch, "x", io.LimitReader(nil, 0), "y"); !errors.Is(err, context.Canceled) {
		t.Errorf("a program of a stream that goes on: %v", err)
	}
	os.Remove(filepath.Join(p.scratch, "x"))
}
