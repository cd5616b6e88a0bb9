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
