package fake_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"banger/internal/daemon/driver"
	"banger/internal/daemon/driver/fake"
)

func newDisk(t *testing.T, h *fake.Host) (path string) {
	t.Helper()
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(base, []byte("the image"), 0o600); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "disk")
	if err := h.Disk().Create(t.Context(), base, path, 1<<30); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDisk(t *testing.T) {
	dir := t.TempDir()
	h := fake.New(dir, "/none")
	path := newDisk(t, h)
	info, err := os.Stat(path)
	if err != nil || info.Size() != 1<<30 || info.Sys().(*syscall.Stat_t).Blocks > 100 {
		t.Fatalf("not sparse: %+v, %v", info, err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	begin := make([]byte, 9)
	if f.Read(begin); string(begin) != "the image" {
		t.Errorf("the disk begins with %q", begin)
	}
	if err := h.Disk().Create(t.Context(), path, path, 1<<30); !errors.Is(err, os.ErrExist) {
		t.Errorf("created twice: %v", err)
	}

	if h.Text() != "" {
		t.Fatal(h.Text())
	}
	a, err := h.Disk().Attach(t.Context(), "one", path)
	if err != nil || a.Path != "disk" || a.Format != "raw" || a.Device == "" {
		t.Fatalf("%+v, %v", a, err)
	}
	if _, err := h.Disk().Attach(t.Context(), "two", path); err != nil {
		t.Fatal(err)
	}
	want := "dm bgfake-one of one\ndm bgfake-two of two\nloop loop0 of one\nloop loop1 of two\n"
	// The state is in the directory: another Host sees it.
	if got := fake.New(dir, "/none").Text(); got != want {
		t.Fatalf("%q", got)
	}
	if _, err := h.Disk().Attach(t.Context(), "one", path); !errors.Is(err, os.ErrExist) {
		t.Errorf("attached twice: %v", err)
	}

	h.SetBusy("one", true)
	if err := h.Disk().Detach(t.Context(), "one", path, a); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("busy: %v", err)
	}
	h.SetBusy("one", false)
	// Without a handle, and when there is nothing, too.
	for range 2 {
		if err := h.Disk().Detach(t.Context(), "one", path, driver.Attached{}); err != nil {
			t.Fatal(err)
		}
	}
	if got := h.Text(); got != "dm bgfake-two of two\nloop loop1 of two\n" {
		t.Fatalf("%q", got)
	}

	var kinds []string
	for _, inv := range h.Inventories() {
		kinds = append(kinds, inv.Kind())
		list, err := inv.List(t.Context())
		if err != nil || len(list) != 1 || list[0].VM != "two" || list[0].Kind != inv.Kind() {
			t.Fatalf("%+v, %v", list, err)
		}
		for range 2 {
			if err := inv.Remove(t.Context(), list[0]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !slices.Equal(kinds, []string{"dm", "loop"}) || h.Text() != "" {
		t.Errorf("%q %q", kinds, h.Text())
	}
	for range 2 {
		if err := h.Disk().Remove(t.Context(), path); err != nil {
			t.Fatal(err)
		}
	}
}

// Each effect fails before it has happened, with nothing done, and after it.
func TestFaults(t *testing.T) {
	boom := errors.New("boom")
	var seen []string
	for _, point := range fake.Points() {
		if !strings.HasPrefix(point, "disk.") {
			continue
		}
		for _, when := range []string{"/before", "/after"} {
			h := fake.New(t.TempDir(), "/none")
			path := newDisk(t, h)
			os.Remove(path)
			h.Fault = func(p string) error {
				seen = append(seen, p)
				if p == point+when {
					return boom
				}
				return nil
			}
			err := func() error {
				ctx := context.Background()
				if err := h.Disk().Create(ctx, filepath.Join(filepath.Dir(path), "base"), path, 1<<20); err != nil {
					return err
				}
				a, err := h.Disk().Attach(ctx, "one", path)
				if err != nil {
					return err
				}
				if err := h.Disk().Detach(ctx, "one", path, a); err != nil {
					return err
				}
				return h.Disk().Remove(ctx, path)
			}()
			if !errors.Is(err, boom) {
				t.Errorf("%s: %v", point+when, err)
			}
			_, err = os.Stat(path)
			state := h.Text()
			if err == nil {
				state += "disk"
			}
			want := map[string]string{
				"disk.create/before":      "",
				"disk.create/after":       "disk",
				"disk.attach.loop/before": "disk",
				"disk.attach.loop/after":  "loop loop0 of one\ndisk",
				"disk.attach.dm/before":   "loop loop0 of one\ndisk",
				"disk.attach.dm/after":    "dm bgfake-one of one\nloop loop0 of one\ndisk",
				"disk.detach.dm/before":   "dm bgfake-one of one\nloop loop0 of one\ndisk",
				"disk.detach.dm/after":    "loop loop0 of one\ndisk",
				"disk.detach.loop/before": "loop loop0 of one\ndisk",
				"disk.detach.loop/after":  "disk",
				"disk.remove/before":      "disk",
				"disk.remove/after":       "",
			}[point+when]
			if state != want {
				t.Errorf("%s: %q, want %q", point+when, state, want)
			}
		}
	}
	for _, p := range seen {
		if name, _, _ := strings.Cut(p, "/"); !slices.Contains(fake.Points(), name) {
			t.Errorf("%s is not among Points", p)
		}
	}
}
