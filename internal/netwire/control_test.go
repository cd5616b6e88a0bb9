package netwire

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/test/need"
)

// vmDir is a VM's directory whose path is too long for a socket's address.
func vmDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 40))
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// answer answers one request with line, or hangs up.
func answer(t *testing.T, dir, line string) {
	t.Helper()
	t.Chdir(dir) // for the short name
	l, err := net.Listen("unix", ControlSocket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		conn.Read(make([]byte, 1<<10))
		conn.Write([]byte(line))
	}()
}

func TestAsk(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, tt := range []struct {
		name, line string
		away       bool
		word       string
	}{
		{"answered", `{"stats":{"refused":3}}` + "\n", false, ""},
		{"hung up", "", true, "not there"},
		{"cut off", `{"stats"`, true, "not there"},
		{"rubbish", "hello\n", false, "cannot understand"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := vmDir(t)
			if _, err := Ask(ctx, dir, Request{Op: OpStats}); !errors.Is(err, ErrAway) {
				t.Errorf("without a socket: %v, which is not ErrAway", err)
			}
			answer(t, dir, tt.line)
			reply, err := Ask(ctx, dir, Request{Op: OpStats})
			switch {
			case tt.word == "":
				if err != nil || reply.Stats == nil || reply.Stats.Refused != 3 {
					t.Errorf("got %+v, %v", reply, err)
				}
			case err == nil || !strings.Contains(err.Error(), tt.word) || errors.Is(err, ErrAway) != tt.away:
				t.Errorf("got %v, away %v", err, errors.Is(err, ErrAway))
			}
		})
	}
}

// What stands where the VM's directory should be is an error at once, a FIFO too.
func TestAskNoDirectory(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := Ask(t.Context(), fifo, Request{Op: OpStats})
		ended <- err
	}()
	select {
	case err := <-ended:
		if !errors.Is(err, syscall.ENOTDIR) || errors.Is(err, ErrAway) {
			t.Errorf("got %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("Ask hangs")
	}
}

func TestConfig(t *testing.T) {
	dir := vmDir(t)
	want := Config{MAC: "02:00:00:00:00:01", Network: Network{Preset: "lan", Deny: []string{"192.168.1.7"}}}
	if err := WriteConfig(dir, want); err != nil {
		t.Fatal(err)
	}
	got, err := ReadConfig(dir)
	if err != nil || got.Version != Version || got.MAC != want.MAC || got.Preset != "lan" || len(got.Deny) != 1 {
		t.Errorf("read %+v, %v", got, err)
	}
	info, err := os.Stat(filepath.Join(dir, ConfigFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v", info, err)
	}
	if err := os.WriteFile(filepath.Join(dir, ConfigFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadConfig(dir); err == nil {
		t.Error("half a file was read")
	}
}

// On a full disk nothing new can be written, and what was before can be gone back to.
func TestConfigOnAFullDisk(t *testing.T) {
	need.Need(t, "root")
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	want := func(preset string) {
		t.Helper()
		if c, err := ReadConfig(dir); err != nil || c.Preset != preset {
			t.Fatalf("it is %+v, %v, not %s", c, err, preset)
		}
	}
	write := func(preset string) error { return WriteConfig(dir, Config{Network: Network{Preset: preset}}) }
	for _, preset := range []string{"none", "lan", "internet"} {
		if err := write(preset); err != nil {
			t.Fatal(err)
		}
	}
	filler, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	for err == nil {
		_, err = filler.Write(make([]byte, 4096))
	}
	if err := write("host"); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	want("internet")
	if err := write("lan"); err != nil {
		t.Fatalf("going back: %v", err)
	}
	want("lan")
	if err := RemoveConfig(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "run")); err != nil || len(left) > 0 {
		t.Errorf("it leaves %v, %v", left, err)
	}
	if err := RemoveConfig(dir); err != nil {
		t.Errorf("when nothing is there: %v", err)
	}
}

// Going back twice, and to what stands there already, is nothing special.
func TestConfigBackAndForth(t *testing.T) {
	dir := vmDir(t)
	for i, preset := range []string{"none", "none", "lan", "none", "none", "lan", "lan", "host", "lan", "none", "host"} {
		if err := WriteConfig(dir, Config{Network: Network{Preset: preset}}); err != nil {
			t.Fatal(err)
		}
		if c, err := ReadConfig(dir); err != nil || c.Preset != preset {
			t.Errorf("step %d: it is %+v, %v, not %s", i, c, err, preset)
		}
	}
	if err := RemoveConfig(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "run")); err != nil || len(left) > 0 {
		t.Errorf("it leaves %v, %v", left, err)
	}
}
