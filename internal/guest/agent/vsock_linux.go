package agent

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

const (
	// maxConnections bounds the connections that are open at a time. Firecracker has 1023
	// for a VM; what is beyond the agent's own bounds gets an answer that says so.
	maxConnections = 512
	// vsockBacklog bounds the connections that wait for accept.
	vsockBacklog = 128
	// acceptPause is how long a failed accept is waited after: there are no more
	// descriptors.
	acceptPause = 100 * time.Millisecond
)

// Vsock is a listener that takes connections of the host alone.
//
// Firecracker makes each a connection to its Unix socket, with these ends (see
// src/vmm/src/devices/virtio/vsock/csm/connection.rs there): a host that ends its writing
// has closed both directions; one that the guest ends is not told to the host; and when
// the guest has closed both, what the host has not read may be dropped after 2 s. So the
// streams say in frames what ends (see package wire), and after the last one the host
// closes: a slow reader loses nothing.
type Vsock struct {
	file  *os.File
	raw   syscall.RawConn
	from  func(unix.Sockaddr) bool
	slots chan struct{}
}

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
	return newVsock(os.NewFile(uintptr(fd), "vsock"), fromHost)
}

func newVsock(file *os.File, from func(unix.Sockaddr) bool) (*Vsock, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("cannot wait for the host: %w", err)
	}
	return &Vsock{file: file, raw: raw, from: from, slots: make(chan struct{}, maxConnections)}, nil
}

// fromHost tells the host's address, see VMADDR_CID_HOST in vsock(7), which no process of
// the guest has.
func fromHost(from unix.Sockaddr) bool {
	vm, ok := from.(*unix.SockaddrVM)
	return ok && vm.CID == unix.VMADDR_CID_HOST
}

// Accept waits for the host. Anybody else, a process of the guest among them, is sent
// away. While maxConnections are open the rest wait in the backlog.
func (v *Vsock) Accept() (net.Conn, error) {
	v.slots <- struct{}{}
	release := func() { <-v.slots }
	for {
		fd, from := -1, unix.Sockaddr(nil)
		var accepted error
		err := v.raw.Read(func(listener uintptr) bool {
			fd, from, accepted = unix.Accept4(int(listener), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			return accepted != unix.EAGAIN
		})
		switch {
		case err != nil:
			release()
			return nil, net.ErrClosed
		case accepted == unix.EINTR, accepted == unix.ECONNABORTED:
			continue
		case accepted != nil:
			release()
			return nil, os.NewSyscallError("accept", accepted)
		case !v.from(from):
			unix.Close(fd)
			continue
		}
		return &vsockConn{File: os.NewFile(uintptr(fd), "vsock"), release: release}, nil
	}
}

// Close ends the listening.
func (v *Vsock) Close() error { return v.file.Close() }

// ServeVsock serves each connection of the host as one stream, until the listener is
// closed.
func (a *Agent) ServeVsock(v *Vsock) error {
	defer v.Close()
	for {
		conn, err := v.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil:
			time.Sleep(acceptPause)
			continue
		}
		go a.Handle(conn)
	}
}

// vsockConn makes a connection of a file: package net knows no vsock.
type vsockConn struct {
	*os.File
	once    sync.Once
	release func() // when the socket is closed
}

func (c *vsockConn) LocalAddr() net.Addr  { return vsockAddr{} }
func (c *vsockConn) RemoteAddr() net.Addr { return vsockAddr{} }

// Close closes the connection, and what the host has not read is lost.
func (c *vsockConn) Close() error {
	err := net.ErrClosed
	c.once.Do(func() {
		err = c.File.Close()
		c.release()
	})
	return err
}

// Finish makes it the host's to close, see wire.Finisher. That it does is certain: the
// connection of a process that is gone is closed for it.
func (c *vsockConn) Finish() error {
	err := net.ErrClosed
	c.once.Do(func() {
		var rest *os.File
		if rest, err = c.again(); err != nil {
			err = errors.Join(err, c.File.Close())
			c.release()
			return
		}
		err = c.File.Close()
		go func() {
			defer c.release()
			defer rest.Close()
			buf := make([]byte, 4<<10)
			for {
				if _, err := rest.Read(buf); err != nil {
					return
				}
			}
		}()
	})
	return err
}

// again is the same socket as another file: the waits of the first end with it.
func (c *vsockConn) again() (*os.File, error) {
	raw, err := c.File.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, dupErr := -1, error(nil)
	if err := raw.Control(func(from uintptr) {
		fd, dupErr = unix.FcntlInt(from, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, dupErr
	}
	return os.NewFile(uintptr(fd), "vsock"), nil
}

type vsockAddr struct{}

func (vsockAddr) Network() string { return "vsock" }
func (vsockAddr) String() string  { return "vsock" }
