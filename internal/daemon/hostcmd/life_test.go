package hostcmd

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The end of ctx asks the whole group, and it may clean up.
func TestCancelAsksTheGroup(t *testing.T) {
	file := filepath.Join(t.TempDir(), "note")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	p, err := Start(ctx, role("family", file))
	if err != nil {
		t.Fatal(err)
	}
	leader, child := readyLine(t, p.Stdout)
	begin := time.Now()
	cancel()
	err = p.Wait()
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if took := time.Since(begin); took >= KillAfter {
		t.Errorf("it took %v: nobody got SIGTERM", took)
	}
	if note, err := os.ReadFile(file); err != nil || string(note) != "cleaned up" {
		t.Errorf("the child noted %q, %v", note, err)
	}
	eventually(t, "all are gone", func() bool { return !lives(leader) && !lives(child) })
}

// Who does not listen is killed, with all others of the group.
func TestCancelKillsTheGroup(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	p, err := Start(ctx, role("family", "", "stubborn"))
	if err != nil {
		t.Fatal(err)
	}
	leader, child := readyLine(t, p.Stdout)
	begin := time.Now()
	cancel()
	select {
	case <-p.done:
	case <-time.After(KillAfter + 15*time.Second):
		t.Fatal("it goes on")
	}
	if took := time.Since(begin); took < KillAfter {
		t.Errorf("it took only %v: SIGKILL came too early", took)
	}
	var e *Error
	if err := p.Wait(); !errors.As(err, &e) || !errors.Is(err, context.Canceled) || e.ExitCode != -1 {
		t.Errorf("error %#v", err)
	}
	eventually(t, "all are gone", func() bool { return !lives(leader) && !lives(child) })
}

// A command that ends takes along whom it left in its group.
func TestNobodyIsLeftInTheGroup(t *testing.T) {
	out, err := Run(t.Context(), role("leave"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is gone", func() bool { return !lives(pid) })
}

// Who left the group is not followed, and does not hold up anybody either.
func TestStrayHoldsUpNobody(t *testing.T) {
	for name, run := range map[string]func() ([]byte, error){
		"Run": func() ([]byte, error) { return Run(t.Context(), role("stray")) },
		"Start": func() ([]byte, error) {
			p, err := Start(t.Context(), role("stray"))
			if err != nil {
				return nil, err
			}
			out, err := io.ReadAll(p.Stdout)
			return out, errors.Join(err, p.Wait())
		},
	} {
		begin := time.Now()
		out, err := run()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
		if err != nil {
			t.Fatal(err)
		}
		if !lives(pid) {
			t.Errorf("%s: the stray is dead", name)
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
		if took := time.Since(begin); took > strayGrace+5*time.Second {
			t.Errorf("%s: it took %v", name, took)
		}
	}
}

// A daemon killed with SIGKILL leaves no command behind, also one like mmdebstrap,
// where only the children heed SIGTERM.
func TestNobodyOutlivesTheDaemon(t *testing.T) {
	file := filepath.Join(t.TempDir(), "note")
	kill, out := startDaemon(t, "family", file)
	leader, child := readyLine(t, out)
	if !lives(leader) || !lives(child) {
		t.Fatal("the family does not live")
	}
	kill()
	eventually(t, "all are gone", func() bool { return !lives(leader) && !lives(child) })
	if note, err := os.ReadFile(file); err != nil || string(note) != "cleaned up" {
		t.Errorf("the child noted %q, %v", note, err)
	}
}

// A command that closes all that it did not ask for still gets the signal.
func TestCloserDoesNotOutliveTheDaemon(t *testing.T) {
	kill, out := startDaemon(t, "closer")
	pid, _ := readyLine(t, out)
	kill()
	eventually(t, "it is gone", func() bool { return !lives(pid) })
}

// The limit that the package comment tells of.
func TestWhoIgnoresSIGTERMOutlivesTheDaemon(t *testing.T) {
	kill, out := startDaemon(t, "family", "", "stubborn")
	leader, child := readyLine(t, out)
	kill()
	if !lives(leader) || !lives(child) {
		t.Error("they are killed after all: the package comment is wrong")
	}
	_ = syscall.Kill(-leader, syscall.SIGKILL)
	eventually(t, "all are gone", func() bool { return !lives(leader) && !lives(child) })
}

func startDaemon(t *testing.T, args ...string) (kill func(), out io.Reader) {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = roleEnviron("daemon")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(kill)
	return kill, out
}

// Threads come and go in a Go program, and the signal of Pdeathsig comes when the
// one that forked goes.
func TestThreadsThatEndHarmNobody(t *testing.T) {
	p, err := Start(t.Context(), Command{Argv: []string{"cat"}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	for range 100 {
		go func() {
			// A thread that a goroutine is locked to ends with it.
			runtime.LockOSThread()
			done <- struct{}{}
		}()
	}
	for range 100 {
		<-done
	}
	if _, err := io.WriteString(p.Stdin, "alive"); err != nil {
		t.Fatal(err)
	}
	p.Stdin.Close()
	if out, err := io.ReadAll(p.Stdout); err != nil || string(out) != "alive" {
		t.Errorf("%q, %v", out, err)
	}
	if err := p.Wait(); err != nil {
		t.Error(err)
	}
}
