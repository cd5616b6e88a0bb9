package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// edgeGuard is how long a wait trusts in being woken. The kernel wakes a port's
// waiters at each event; looking again this often costs nothing measurable.
const edgeGuard = 2 * time.Second

// Port is the guest's end of a virtio-serial port, a character device that no host
// may be connected to.
//
// While there is none, a read returns 0 at once, a write EAGAIN, and poll reports
// POLLHUP all the time (drivers/char/virtio_console.c: port_fops_read, _write,
// _poll), so a port must be waited for by edges. The runtime's poller does that: it
// registers descriptors once, with EPOLLIN|EPOLLOUT|EPOLLRDHUP|EPOLLET.
type Port struct {
	file *os.File
	raw  syscall.RawConn
	away bool // the last read found no host; of the reader only

	mu     sync.Mutex
	cutOff time.Time // the write deadline of the user
}

// OpenPort opens a port. It stays usable after the root was switched.
func OpenPort(path string) (*Port, error) {
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	p, err := newPort(file)
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("cannot wait for port %s: %w", path, err)
	}
	return p, nil
}

func newPort(file *os.File) (*Port, error) {
	// This fails for a file that the poller does not take.
	if err := file.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &Port{file: file, raw: raw}, nil
}

// Read reads what the host has sent, waiting for it. When it finds that no host is
// connected it returns io.EOF, once; the next call waits for a host.
func (p *Port) Read(b []byte) (int, error) {
	for {
		if p.file.SetReadDeadline(time.Now().Add(edgeGuard)) != nil {
			return 0, os.ErrClosed
		}
		var n int
		var rerr error
		err := p.raw.Read(func(fd uintptr) bool {
			n, rerr = retry(func() (int, error) { return unix.Read(int(fd), b) })
			switch {
			case rerr == unix.EAGAIN:
				p.away = false
				return false
			case rerr != nil:
				return true
			case n > 0:
				p.away = false
				return true
			}
			seen := p.away
			p.away = true
			return !seen
		})
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue
		case err != nil:
			return 0, os.ErrClosed
		case rerr != nil:
			return 0, os.NewSyscallError("read", rerr)
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// Write writes b, waiting for a host that takes it.
func (p *Port) Write(b []byte) (int, error) {
	total := 0
	for total < len(b) {
		if err := p.armWrite(); err != nil {
			return total, err
		}
		var n int
		var werr error
		err := p.raw.Write(func(fd uintptr) bool {
			n, werr = retry(func() (int, error) { return unix.Write(int(fd), b[total:]) })
			return werr != unix.EAGAIN
		})
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue // armWrite tells whose deadline it was
		case err != nil:
			return total, os.ErrClosed
		case werr != nil:
			return total, os.NewSyscallError("write", werr)
		case n == 0:
			return total, io.ErrShortWrite
		}
		total += n
	}
	return total, nil
}

func retry(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); err != unix.EINTR {
			return n, err
		}
	}
}

// armWrite sets the deadline of one wait for the port to take bytes.
func (p *Port) armWrite() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := time.Now().Add(edgeGuard)
	if !p.cutOff.IsZero() {
		if !time.Now().Before(p.cutOff) {
			return os.ErrDeadlineExceeded
		}
		if p.cutOff.Before(t) {
			t = p.cutOff
		}
	}
	if p.file.SetWriteDeadline(t) != nil {
		return os.ErrClosed
	}
	return nil
}

// SetWriteDeadline bounds the current and all later writes; the zero time lifts it.
func (p *Port) SetWriteDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cutOff = t
	if t.IsZero() {
		return nil
	}
	return p.file.SetWriteDeadline(t)
}

// Close closes the port and ends its waits.
func (p *Port) Close() error { return p.file.Close() }
