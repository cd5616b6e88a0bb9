package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// The addresses of the world. 203.0.113.0/24 plays the internet. The peer has two, so that
// the guest's routes decide by which card it goes there.
const (
	hostSide  = "203.0.113.2"
	peerOurs  = "203.0.113.1" // by banger-net
	peerSlirp = "203.0.113.9"
)

// The ports of the peer: it reads to the end, sends what it is asked for, and echoes.
const (
	portSink   = 7001
	portSource = 7002
	portEcho   = 7003
)

// world is two network namespaces with a cable between them and no way out: in "host" the
// daemon runs, in "peer" this program serves.
type world struct {
	host, peer *namespace
	listeners  []net.Listener
	served     sync.WaitGroup
}

func newWorld() (w *world, err error) {
	w = &world{}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.host, err = newNamespace(); err != nil {
		return nil, err
	}
	if w.peer, err = newNamespace(); err != nil {
		return nil, err
	}
	// Descriptor 3 is the peer's namespace.
	if err := w.host.ip("link add cable type veth peer name cable netns /proc/self/fd/3", w.peer.file); err != nil {
		return nil, err
	}
	for _, step := range []struct {
		n    *namespace
		args string
	}{
		{w.host, "addr add " + hostSide + "/24 dev cable"},
		{w.peer, "addr add " + peerOurs + "/24 dev cable"}, {w.peer, "addr add " + peerSlirp + "/24 dev cable"},
		{w.host, "link set lo up"}, {w.peer, "link set lo up"},
		{w.host, "link set cable up"}, {w.peer, "link set cable up"},
	} {
		if err := step.n.ip(step.args); err != nil {
			return nil, err
		}
	}
	for port, serve := range map[int]func(net.Conn){portSink: swallow, portSource: send, portEcho: echoBack} {
		if err := w.serve(port, serve); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// close ends the peer; the namespaces go with their last process.
func (w *world) close() error {
	for _, l := range w.listeners {
		l.Close()
	}
	w.served.Wait()
	for _, n := range []*namespace{w.host, w.peer} {
		if n != nil {
			n.file.Close()
		}
	}
	return nil
}

// serve accepts on all addresses of the peer.
func (w *world) serve(port int, f func(net.Conn)) error {
	return w.peer.do(func() error {
		l, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		w.listeners = append(w.listeners, l)
		w.served.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() { // ends with the guest's connection
					defer conn.Close()
					f(conn)
				}()
			}
		})
		return nil
	})
}

const serveBuffer = 256 << 10

func swallow(conn net.Conn) {
	buf := make([]byte, serveBuffer)
	for {
		if _, err := conn.Read(buf); err == io.EOF {
			conn.Write(buf[:1])
			return
		} else if err != nil {
			return
		}
	}
}

func send(conn net.Conn) {
	var left uint64
	if binary.Read(conn, binary.BigEndian, &left) != nil {
		return
	}
	buf := make([]byte, serveBuffer)
	for left > 0 {
		n, err := conn.Write(buf[:min(left, serveBuffer)])
		if err != nil {
			return
		}
		left -= uint64(n)
	}
}

func echoBack(conn net.Conn) {
	buf := make([]byte, 64)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return
		}
		if _, err := conn.Write(buf[:n]); err != nil {
			return
		}
	}
}

// namespace is a network namespace. It ends with this program and with what runs in it.
type namespace struct{ file *os.File }

func newNamespace() (*namespace, error) {
	n := &namespace{}
	err := inThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("cannot make a network namespace: %w", err)
		}
		n.file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return n, err
}

// do runs f in a thread of the namespace: sockets and processes that it makes stay there.
func (n *namespace) do(f func() error) error {
	return inThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("cannot enter a network namespace: %w", err)
		}
		return f()
	})
}

// inThread runs f in a thread that ends with it.
func inThread(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		result <- f()
	}()
	return <-result
}

// ip runs ip(8) in the namespace.
func (n *namespace) ip(args string, files ...*os.File) error {
	return n.do(func() error {
		cmd := exec.Command("ip", strings.Fields(args)...)
		cmd.ExtraFiles = files
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w\n%s", args, err, out)
		}
		return nil
	})
}
