package agent

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

// maxConnections bounds the connections that are served at a time. Firecracker has 1023
// for a VM; what is beyond the agent's own bounds gets an answer that says so.
const maxConnections = 512

// vsockBacklog bounds the connections that wait for accept.
const vsockBacklog = 128

// Vsock is a listener that takes connections of the host alone.
type Vsock struct{ file *os.File }

// ListenVsock listens on wire.VsockPort. It stays usable after the root was switched.
func ListenVsock() (*Vsock, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot make the agent's socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: wire.VsockPort}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot take the agent's port %d: %w", wire.VsockPort, err)
	}
	if err := unix.Listen(fd, vsockBacklog); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot listen for the host: %w", err)
	}
	return &Vsock{os.NewFile(uintptr(fd), "vsock")}, nil
}

// Accept waits for the host. Anybody else, a process of the guest among them, is sent
// away.
func (v *Vsock) Accept() (net.Conn, error) {
	raw, err := v.file.SyscallConn()
	if err != nil {
		return nil, err
	}
	for {
		fd, from := -1, unix.Sockaddr(nil)
		var accepted error
		err := raw.Read(func(listener uintptr) bool {
			fd, from, accepted = unix.Accept4(int(listener), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			return accepted != unix.EAGAIN
		})
		if err != nil {
			return nil, err
		}
		if accepted != nil {
			return nil, os.NewSyscallError("accept", accepted)
		}
		if !fromHost(from) {
			unix.Close(fd)
			continue
		}
		return &vsockConn{os.NewFile(uintptr(fd), "vsock")}, nil
	}
}

// Close ends the listening.
func (v *Vsock) Close() error { return v.file.Close() }

// fromHost tells the host's address, see VMADDR_CID_HOST in vsock(7), which no process of
// the guest has.
func fromHost(from unix.Sockaddr) bool {
	vm, ok := from.(*unix.SockaddrVM)
	return ok && vm.CID == unix.VMADDR_CID_HOST
}

// listener is what ServeVsock needs of a Vsock.
type listener interface {
	Accept() (net.Conn, error)
	Close() error
}

// acceptPause is how long a failed accept is waited after: there are no more descriptors.
const acceptPause = 100 * time.Millisecond

// ServeVsock serves each connection of the host as one stream, until the listener is
// closed.
func (a *Agent) ServeVsock(l listener) error {
	defer l.Close()
	slots := make(chan struct{}, maxConnections)
	for {
		conn, err := l.Accept()
		switch {
		case errors.Is(err, os.ErrClosed), errors.Is(err, net.ErrClosed):
			return err
		case err != nil:
			time.Sleep(acceptPause)
			continue
		}
		slots <- struct{}{} // the rest wait in the backlog
		go func() {
			defer func() { <-slots }()
			a.Handle(conn)
		}()
	}
}

// vsockConn makes a connection of a file: package net knows no vsock.
type vsockConn struct{ *os.File }

func (c *vsockConn) LocalAddr() net.Addr  { return vsockAddr{} }
func (c *vsockConn) RemoteAddr() net.Addr { return vsockAddr{} }

type vsockAddr struct{}

func (vsockAddr) Network() string { return "vsock" }
func (vsockAddr) String() string  { return "vsock" }
