package qemuproc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"banger/api"
	"banger/internal/config"
)

// serveQMP plays QEMU's end of one conversation: after the greeting it answers the
// commands in order, each with lines in which %d is the command's id.
func serveQMP(t *testing.T, conn net.Conn, greeting string, answers ...string) {
	t.Helper()
	go func() {
		defer conn.Close()
		fmt.Fprint(conn, greeting)
		in := bufio.NewReader(conn)
		for id, answer := range answers {
			if _, err := in.ReadString('\n'); err != nil {
				return
			}
			fmt.Fprint(conn, strings.ReplaceAll(answer, "%d", fmt.Sprint(id+1)))
		}
		_, _ = in.ReadString('\n')
	}()
}

const (
	greeting = `{"QMP": {"version": {}, "capabilities": ["oob"]}}` + "\n"
	done     = `{"return": {}, "id": %d}` + "\n"
)

func TestQMPConversation(t *testing.T) {
	event := `{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RTC_CHANGE", "data": {}}` + "\n"
	for _, c := range []struct {
		name, greeting string
		answers        []string
		want           string // of the error
	}{
		{"plain", greeting, []string{done, `{"return": {"status": "running"}, "id": %d}` + "\n"}, ""},
		{"events between", greeting, []string{event + done, event + event + `{"return": {"status": "running"}, "id": %d}` + "\n" + event}, ""},
		{"events first", event + event + greeting, []string{done, `{"return": {"status": "running"}, "id": %d}` + "\n"}, ""},
		{"events only", strings.Repeat(event, maxLines+1), nil, "did not greet in"},
		{"replies to others", greeting, []string{done, `{"return": {"status": "x"}, "id": 99}` + "\n" + `{"return": {"status": "running"}, "id": %d}` + "\n"}, ""},
		{"a long line", greeting, []string{done, `{"event": "X", "data": "` + strings.Repeat("x", 100_000) + `"}` + "\n" + `{"return": {"status": "running"}, "id": %d}` + "\n"}, ""},
		{"refused", greeting, []string{done, `{"id": %d, "error": {"class": "GenericError", "desc": "no"}}` + "\n"}, `refused query-status: "no"`},
		{"not even read", greeting, []string{done, `{"error": {"class": "GenericError", "desc": "JSON parse error"}}` + "\n"}, "JSON parse error"},
		{"no greeting", `{"return": {}}` + "\n", nil, "did not greet"},
		{"no JSON", "hello\n", nil, "invalid character"},
		{"an endless line", greeting, []string{done, strings.Repeat("x", maxReply+2) + "\n"}, "more than"},
		{"the end", greeting, []string{done}, "EOF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			if c.name == "the end" {
				go func() {
					fmt.Fprint(theirs, greeting)
					in := bufio.NewReader(theirs)
					_, _ = in.ReadString('\n')
					fmt.Fprint(theirs, `{"return": {}, "id": 1}`+"\n")
					_, _ = in.ReadString('\n')
					theirs.Close()
				}()
			} else {
				serveQMP(t, theirs, c.greeting, c.answers...)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			var status struct{ Status string }
			q, err := startQMP(ctx, ours)
			if err == nil {
				defer q.Close()
				err = q.call(ctx, "query-status", &status)
			}
			if c.want == "" {
				if err != nil || status.Status != "running" {
					t.Errorf("status %q, error %v", status.Status, err)
				}
			} else if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestQMPRefusalIsTyped(t *testing.T) {
	ours, theirs := net.Pipe()
	serveQMP(t, theirs, greeting, done, `{"id": %d, "error": {"class": "CommandNotFound", "desc": "no"}}`+"\n")
	q, err := startQMP(t.Context(), ours)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	var refused *qmpError
	if err := q.call(t.Context(), "fly", nil); !errors.As(err, &refused) || refused.Class != "CommandNotFound" || refused.Command != "fly" {
		t.Errorf("error %v", err)
	}
}

func TestQMPEndsWithContext(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("somebody asked")
	time.AfterFunc(10*time.Millisecond, func() { cancel(why) })
	if _, err := startQMP(ctx, ours); !errors.Is(err, why) {
		t.Errorf("error %v", err)
	}
	if _, err := ours.Write(nil); err == nil {
		t.Error("the connection is still open")
	}
}

// listenQMP listens where QEMU would.
func listenQMP(t *testing.T, dir string) net.Listener {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, QMPSocket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func status(s string) string { return `{"return": {"status": "` + s + `"}, "id": %d}` + "\n" }

func TestBootWaitsForTheGuest(t *testing.T) {
	dir := t.TempDir()
	l := listenQMP(t, dir)
	var asked atomic.Int64
	go func() {
		for _, s := range []string{"prelaunch", "inmigrate", "running"} {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			asked.Add(1)
			serveQMP(t, conn, greeting, done, status(s))
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := New(config.KVMAuto).Boot(ctx, dir, exampleSpec()); err != nil {
		t.Error(err)
	}
	if n := asked.Load(); n != 3 {
		t.Errorf("Boot was content with answer %d", n)
	}
}

func TestBootOfAStoppedGuestFails(t *testing.T) {
	dir := t.TempDir()
	l := listenQMP(t, dir)
	go func() {
		if conn, err := l.Accept(); err == nil {
			serveQMP(t, conn, greeting, done, status("internal-error"))
		}
	}()
	err := New(config.KVMAuto).Boot(t.Context(), dir, exampleSpec())
	if err == nil || !strings.Contains(err.Error(), "internal-error") {
		t.Errorf("error %v", err)
	}
}

// A QEMU that takes the connection and says nothing: one bounded wait, and a hint.
func TestBootOfASilentQEMU(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dialled := 0
		err := boot(t.Context(), func(context.Context) (net.Conn, error) {
			dialled++
			ours, theirs := net.Pipe()
			t.Cleanup(func() { theirs.Close() })
			return ours, nil
		})
		if err == nil || err.Error() != "cannot boot: cannot talk to QEMU: no answer within 30s" || dialled != 1 {
			t.Errorf("after %d attempts: %v", dialled, err)
		}
		if api.CodeOf(err) != api.Unresponsive || api.HintOf(err) != "banger doctor" || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("code %s, hint %q: %v", api.CodeOf(err), api.HintOf(err), err)
		}
	})
}
