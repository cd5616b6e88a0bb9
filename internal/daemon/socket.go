package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/api"
	"banger/internal/config"
	"banger/internal/daemon/proc"
)

const (
	lockTries = 20
	lockPause = 25 * time.Millisecond
)

// lockInstance makes this process the only daemon of a state directory. The lock
// ends with the process.
func lockInstance(l config.Layout) (*os.File, error) {
	f, err := os.OpenFile(l.DaemonLock(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	// A daemon that was killed while it forked leaves the lock with a child for as long
	// as that takes to exec. One that lives is not waited for: who waits here would take
	// over from it although nobody wants another any more.
	for tries := 0; ; tries++ {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || tries == lockTries || holderLives(f) {
			break
		}
		time.Sleep(lockPause)
	}
	if err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("cannot lock %s: %w", l.DaemonLock(), err)
		}
		pid, _ := io.ReadAll(io.NewSectionReader(f, 0, 20))
		return nil, api.Errorf(api.Busy, "a bangerd already runs on %s (pid %s)", l.Root, strings.TrimSpace(string(pid))).
			WithHint("banger daemon status")
	}
	// On a full disk the pid is missing in a message; the lock holds all the same.
	if f.Truncate(0) == nil {
		f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return f, nil
}

// holderLives tells whether the process that wrote its pid into the lock file is there.
func holderLives(f *os.File) bool {
	buf := make([]byte, 20)
	n, _ := f.ReadAt(buf, 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(buf[:n])))
	if err != nil {
		return false
	}
	_, err = proc.Identify(pid)
	return err == nil
}

// listen makes the socket. Whoever holds the instance's lock knows that a socket
// which lies there is stale.
func listen(l config.Layout) (net.Listener, error) {
	info, err := os.Lstat(l.Socket())
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode().Type() != fs.ModeSocket:
		return nil, api.Errorf(api.Refused, "%s is in the way: it is no socket", l.Socket()).WithHint("rm %s", l.Socket())
	default:
		if err := os.Remove(l.Socket()); err != nil {
			return nil, err
		}
	}
	// Bound through a descriptor of the directory: a socket's path has 107 bytes at
	// most, see unix(7).
	dir, err := os.Open(l.Root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	ln, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(l.Socket())))
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", l.Socket(), err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // by that path it would not be found again
	if err := os.Chmod(l.Socket(), 0o600); err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

type peerKey struct{}

// withPeer notes who is at the other end of a connection, see SO_PEERCRED in unix(7).
func withPeer(ctx context.Context, c net.Conn) context.Context {
	cred := &unix.Ucred{Uid: ^uint32(0)}
	if uc, ok := c.(*net.UnixConn); ok {
		if raw, err := uc.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) {
				if got, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
					cred = got
				}
			})
		}
	}
	return context.WithValue(ctx, peerKey{}, cred)
}

func peerFrom(ctx context.Context) *unix.Ucred {
	if cred, ok := ctx.Value(peerKey{}).(*unix.Ucred); ok {
		return cred
	}
	return &unix.Ucred{Uid: ^uint32(0)}
}

// onlyOwner serves the user whose daemon this is, and root.
func onlyOwner(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if uid := peerFrom(r.Context()).Uid; uid != uint32(syscall.Getuid()) && uid != 0 {
			writeError(w, http.StatusForbidden, api.Errorf(api.Refused, "this daemon serves uid %d only", syscall.Getuid()))
			return
		}
		next.ServeHTTP(w, r)
	})
}
