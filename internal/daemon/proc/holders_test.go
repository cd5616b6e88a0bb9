package proc

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestHolders(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	if got, err := Holders(path); err != nil || len(got) != 0 {
		t.Fatalf("an absent file: %v, %v", got, err)
	}
	open := func(flags int) *os.File {
		t.Helper()
		f, err := os.OpenFile(path, flags, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	readWrite := open(os.O_RDWR | os.O_CREATE)
	if got, err := Holders(path); err != nil || len(got) != 0 {
		t.Fatalf("held by this process alone: %v, %v", got, err)
	}
	readOnly := open(os.O_RDONLY)
	// Who only names the file, has it open to look at it, or reads it, holds nothing.
	others := [][]*os.File{{}, {open(unix.O_PATH)}, {readOnly}}
	holders := [][]*os.File{{readWrite}, {open(os.O_WRONLY | os.O_APPEND)}, {readOnly, readWrite}}
	var want []int
	for i, files := range append(others, holders...) {
		cmd := exec.Command("sleep", "60")
		cmd.ExtraFiles = files
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
		if i >= len(others) {
			want = append(want, cmd.Process.Pid)
		}
	}
	holding, err := Holders(path)
	if err != nil {
		t.Fatal(err)
	}
	var got []int
	for _, id := range holding {
		if got = append(got, id.PID); !alive(id) {
			t.Errorf("%+v is nobody", id)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("held by %v, want %v", got, want)
	}
}
