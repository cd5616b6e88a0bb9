package netstack

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/netwire"
)

const (
	controlLine    = 64 << 10        // bytes of a request
	controlTimeout = 5 * time.Second // for a peer to write, and to read
	controlPeers   = 16              // at once; the others wait to be accepted
)

// serveControl answers the requests that come to the socket at path until ctx ends. The
// peers must have the user of this process, or be root. A handler is not interrupted.
func serveControl(ctx context.Context, path string, handler func(netwire.Request) netwire.Reply) error {
	l, err := listenControl(path)
	if err != nil {
		return fmt.Errorf("cannot listen for requests: %w", err)
	}
	var peers sync.WaitGroup
	defer peers.Wait()
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	slots := make(chan struct{}, controlPeers)
	for pause := (acceptPause{}); ; {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := l.AcceptUnix()
		if err != nil {
			<-slots
			if !pause.after(ctx, err) {
				return nil
			}
			continue
		}
		pause = acceptPause{}
		peers.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
			defer stop()
			answerControl(ctx, conn, handler)
		})
	}
}

// listenControl takes the place of a socket that a killed process left. The mode is set
// before the socket has a name, so that it is never open to others.
func listenControl(path string) (*net.UnixListener, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var mode error
		err := c.Control(func(fd uintptr) { mode = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, mode)
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// answerControl reads one request and writes the reply.
func answerControl(ctx context.Context, conn *net.UnixConn, handler func(netwire.Request) netwire.Reply) {
	uid, err := peerUser(conn)
	if err != nil || uid != 0 && uid != os.Geteuid() {
		return
	}
	conn.SetReadDeadline(time.Now().Add(controlTimeout))
	if ctx.Err() != nil {
		return
	}
	line, err := bufio.NewReader(io.LimitReader(conn, controlLine)).ReadBytes('\n')
	if err != nil && len(line) < controlLine {
		return
	}
	reply := answerLine(line, handler)
	data, err := json.Marshal(reply)
	if err != nil {
		return
	}
	conn.SetWriteDeadline(time.Now().Add(controlTimeout))
	conn.Write(append(data, '\n'))
}

func answerLine(line []byte, handler func(netwire.Request) netwire.Reply) netwire.Reply {
	if line[len(line)-1] != '\n' {
		return netwire.Reply{Error: "the request is too long"}
	}
	var r netwire.Request
	if json.Unmarshal(line, &r) != nil {
		return netwire.Reply{Error: "cannot understand the request"}
	}
	switch r.Op {
	case netwire.OpReload, netwire.OpStats:
		return handler(r)
	}
	return netwire.Reply{Error: "unknown request"}
}

// peerUser is the user of the process at the other end.
func peerUser(conn *net.UnixConn) (uid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var got error
	err = raw.Control(func(fd uintptr) { cred, got = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, got); err != nil {
		return 0, err
	}
	return int(cred.Uid), nil
}

// acceptPause is what an accept loop waits after an error, most likely for a descriptor:
// the peer stays in the kernel's queue meanwhile.
type acceptPause struct{ last time.Duration }

// after waits. It is false when the listener is closed or ctx has ended.
func (p *acceptPause) after(ctx context.Context, err error) bool {
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	p.last = min(max(2*p.last, 5*time.Millisecond), time.Second)
	timer := time.NewTimer(p.last)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
