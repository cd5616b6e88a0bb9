package netstack

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"banger/internal/netwire"
	"banger/test/need"
)

// controlIn serves the control socket of a directory that it makes, until the test ends.
func controlIn(t *testing.T, handler func(netwire.Request) netwire.Reply) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	serveControlIn(t, dir, handler)
	return dir
}

func serveControlIn(t *testing.T, dir string, handler func(netwire.Request) netwire.Reply) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	path := filepath.Join(dir, netwire.ControlSocket)
	os.Remove(path)
	ended := make(chan error, 1)
	go func() { ended <- serveControl(ctx, path, handler) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left: %v", err)
		}
	})
	untilTrue(t, "somebody listens", func() bool { // the socket has a name a moment before
		conn, err := net.Dial("unix", path)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

func stats(netwire.Request) netwire.Reply { return netwire.Reply{Stats: &netwire.Stats{Refused: 3}} }

func TestControlAnswers(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	t.Run("", func(t *testing.T) {
		dir := controlIn(t, func(r netwire.Request) netwire.Reply {
			if r.Op == netwire.OpReload {
				return netwire.Reply{Error: "no"}
			}
			return stats(r)
		})
		info, err := os.Stat(filepath.Join(dir, netwire.ControlSocket))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the socket is %v, %v", info, err)
		}
		for range 3 * controlPeers {
			reply, err := netwire.Ask(t.Context(), dir, netwire.Request{Op: netwire.OpStats})
			if err != nil || reply.Stats == nil || reply.Stats.Refused != 3 {
				t.Fatalf("%v, %v", reply, err)
			}
		}
		for op, want := range map[string]string{netwire.OpReload: "no", "": "unknown request", "RELOAD": "unknown request"} {
			if reply, err := netwire.Ask(t.Context(), dir, netwire.Request{Op: op}); err != nil || reply.Error != want {
				t.Errorf("%q: %v, %v", op, reply, err)
			}
		}
	})
}

func TestControlBoundsARequest(t *testing.T) {
	dir := controlIn(t, stats)
	for text, want := range map[string]string{
		strings.Repeat("x", controlLine): `{"error":"the request is too long"}`,
		"{\n":                            `{"error":"cannot understand the request"}`,
		"\n":                             `{"error":"cannot understand the request"}`,
		`{"op":"` + strings.Repeat("y", controlLine-10) + `"}` + "\n": `{"error":"unknown request"}`,
		`{"op":"stats"}`: "", // no line end
		"":               "",
	} {
		c := dialControl(t, dir)
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		c.CloseWrite()
		reply, _ := bufio.NewReader(c).ReadString('\n')
		if strings.TrimSpace(reply) != want {
			t.Errorf("%.20q: the reply is %q, not %q", text, reply, want)
		}
		c.Close()
	}
}

func dialControl(t *testing.T, dir string) *net.UnixConn {
	t.Helper()
	c, err := net.Dial("unix", filepath.Join(dir, netwire.ControlSocket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second))
	return c.(*net.UnixConn)
}

// TestControlSilentPeers: as many as are served at once say nothing. A request waits for
// one of them to be given up, and is answered then.
func TestControlSilentPeers(t *testing.T) {
	dir := controlIn(t, stats)
	var silent []*net.UnixConn
	for range controlPeers {
		silent = append(silent, dialControl(t, dir))
	}
	reply, err := netwire.Ask(t.Context(), dir, netwire.Request{Op: netwire.OpStats})
	if err != nil || reply.Stats == nil {
		t.Errorf("%v, %v", reply, err)
	}
	for _, c := range silent {
		c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); err == io.EOF {
			return
		}
	}
	t.Errorf("more than %d were served at once", controlPeers)
}

// TestControlReplacesAStaleSocket, and nothing else.
func TestControlReplacesAStaleSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, netwire.ControlSocket)
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serveControl(ctx, path, stats) }()
	untilTrue(t, "the stale socket is replaced", func() bool {
		_, err := netwire.Ask(t.Context(), dir, netwire.Request{Op: netwire.OpStats})
		return err == nil
	})
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := serveControl(t.Context(), path, stats); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("with a file in the way: %v", err)
	}
}

// TestControlRefusesOtherUsers: a process of another user gets no answer, although it was
// given the way to the socket.
func TestControlRefusesOtherUsers(t *testing.T) {
	const mark = "BANGER_TEST_CONTROL_FD"
	if os.Getenv(mark) != "" {
		c, err := net.Dial("unix", "/proc/self/fd/3/"+filepath.Base(netwire.ControlSocket))
		if err != nil {
			fmt.Println("DIAL", err)
			return
		}
		fmt.Fprintln(c, `{"op":"stats"}`)
		reply, err := io.ReadAll(c)
		fmt.Printf("REPLY %q %v\n", reply, err)
		return
	}
	need.Need(t, "root")
	dir := controlIn(t, stats)
	if err := os.Chmod(filepath.Join(dir, netwire.ControlSocket), 0o666); err != nil {
		t.Fatal(err)
	}
	run, err := os.Open(filepath.Join(dir, "run"))
	if err != nil {
		t.Fatal(err)
	}
	defer run.Close()
	if err := run.Chmod(0o755); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[uint32]string{0: `"refused":3`, 65534: `REPLY ""`} {
		c := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.timeout=1m")
		c.Env = append(os.Environ(), mark+"=3")
		c.ExtraFiles = []*os.File{run}
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}, Pdeathsig: syscall.SIGKILL}
		out, err := c.CombinedOutput()
		if err != nil || !strings.Contains(strings.ReplaceAll(string(out), `\`, ""), want) {
			t.Errorf("uid %d: %v\n%s", uid, err, out)
		}
	}
}
