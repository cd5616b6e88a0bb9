package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"banger/internal/netwire"
)

const patience = 20 * time.Second

// The VM's end is a SIGTERM: what the log still counts is written, and then the process
// ends.
func TestTermWritesTheLog(t *testing.T) {
	dir, err := os.MkdirTemp("", "net") // short: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, sub := range []string{"run", "log"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 7}
	if err := netwire.WriteConfig(dir, netwire.Config{MAC: mac.String(), Network: netwire.Network{Preset: "none"}}); err != nil {
		t.Fatal(err)
	}
	qemu, err := net.Listen("unix", filepath.Join(dir, netwire.LinkSocket))
	if err != nil {
		t.Fatal(err)
	}
	defer qemu.Close()
	qemu.(*net.UnixListener).SetDeadline(time.Now().Add(patience))
	process := start(t, dir)
	conn, err := qemu.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	const alike = 3
	frame := append(append([]byte(netwire.GatewayMAC()), mac...), make([]byte, 50)...)
	frame[12], frame[13] = 0x88, 0xcc // LLDP, which it does not know
	for range alike {
		if _, err := conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(patience); refused(t, dir) < alike; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d frames were refused", refused(t, dir), alike)
		}
	}
	if err := process.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := process.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	if n := logged(t, dir); n != alike {
		t.Errorf("%d of %d refusals are in the log", n, alike)
	}
}

// start runs the program; that it ends by itself is bounded.
func start(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	program := filepath.Join(t.TempDir(), "banger-net")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", program, "banger/cmd/banger-net")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build banger-net: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, program)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// refused is how many refusals it has counted, 0 while it does not answer yet.
func refused(t *testing.T, dir string) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	reply, err := netwire.Ask(ctx, dir, netwire.Request{Op: netwire.OpStats})
	if errors.Is(err, netwire.ErrAway) {
		return 0
	}
	if err != nil || reply.Stats == nil {
		t.Fatalf("it answers %+v, %v", reply, err)
	}
	return reply.Stats.Refused
}

// logged is how many refusals the log tells of.
func logged(t *testing.T, dir string) (n int64) {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, netwire.LogFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var e netwire.Entry
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatalf("%s: %v", lines.Text(), err)
		}
		n += e.Count
	}
	return n
}
