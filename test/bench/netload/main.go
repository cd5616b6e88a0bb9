// Command netload is what the benchmark of the network runs inside a guest. It answers
// each line of its input with a line of figures, times in ms:
//
//	up ADDRESS BYTES      sends, until the peer has read all: one time
//	down ADDRESS BYTES    receives: one time
//	connect ADDRESS N     the median of N connects, one after the other
//	echo ADDRESS N        the median of N echoes of one byte
//	crowd ADDRESS N       N connects at once, an echo on each: how many worked, the time of all
//	watch ADDRESS         echoes without a pause from now on, until
//	stop                  which tells the median, the worst and how many there were
//
// ADDRESS is that of a peer that reads to the end at one port, sends at another and echoes
// at a third: see the benchmark.
package main

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The ports of the peer, see peerPorts of the benchmark.
const (
	sink   = 7001
	source = 7002
	echo   = 7003
)

// patience bounds whatever is waited for.
const patience = 25 * time.Second

func main() {
	var w *watch
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		answer, err := serve(strings.Fields(lines.Text()), &w)
		if err != nil {
			answer = "error: " + err.Error()
		}
		fmt.Println(answer)
	}
}

// serve does what a line asks for.
func serve(words []string, w **watch) (string, error) {
	if len(words) == 1 && words[0] == "stop" && *w != nil {
		answer, err := (*w).end()
		*w = nil
		return answer, err
	}
	if len(words) < 2 {
		return "", errors.New("a word is missing")
	}
	peer, err := netip.ParseAddr(words[1])
	if err != nil {
		return "", err
	}
	if words[0] == "watch" && *w == nil {
		*w, err = newWatch(peer)
		return "watching", err
	}
	if len(words) != 3 {
		return "", errors.New("a number is missing")
	}
	n, err := strconv.Atoi(words[2])
	if err != nil {
		return "", err
	}
	switch words[0] {
	case "up":
		return figures(up(peer, n))
	case "down":
		return figures(down(peer, n))
	case "connect":
		return figures(times(n, func() (time.Duration, error) { return connect(peer) }))
	case "echo":
		return figures(echoes(peer, n))
	case "crowd":
		return crowd(peer, n)
	}
	return "", fmt.Errorf("there is no %q", words[0])
}

func figures(d time.Duration, err error) (string, error) {
	return fmt.Sprintf("%.4f", milliseconds(d)), err
}

func milliseconds(d time.Duration) float64 { return float64(d) / 1e6 }

func dial(peer netip.Addr, port uint16) (*net.TCPConn, error) {
	conn, err := net.DialTimeout("tcp4", netip.AddrPortFrom(peer, port).String(), patience)
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), conn.SetDeadline(time.Now().Add(patience))
}

// up ends when the peer says that it has read to the end.
func up(peer netip.Addr, n int) (time.Duration, error) {
	conn, err := dial(peer, sink)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	buf := make([]byte, 256<<10)
	begun := time.Now()
	for left := n; left > 0; {
		sent, err := conn.Write(buf[:min(left, len(buf))])
		if err != nil {
			return 0, err
		}
		left -= sent
	}
	if err := conn.CloseWrite(); err != nil {
		return 0, err
	}
	_, err = io.ReadFull(conn, buf[:1])
	return time.Since(begun), err
}

func down(peer netip.Addr, n int) (time.Duration, error) {
	conn, err := dial(peer, source)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	begun := time.Now()
	if err := binary.Write(conn, binary.BigEndian, uint64(n)); err != nil {
		return 0, err
	}
	buf := make([]byte, 256<<10)
	for left := n; left > 0; {
		got, err := conn.Read(buf)
		if err != nil {
			return 0, err
		}
		left -= got
	}
	return time.Since(begun), nil
}

// times is the median of n measurements.
func times(n int, f func() (time.Duration, error)) (time.Duration, error) {
	all := make([]time.Duration, 0, n)
	for range n {
		d, err := f()
		if err != nil {
			return 0, err
		}
		all = append(all, d)
	}
	slices.Sort(all)
	return all[len(all)/2], nil
}

// connect times connect(2) and poll(2) alone: Go's own part is large on a slow guest. Both
// sides have closed before it returns, so that the end of one does not fall into the next.
func connect(peer netip.Addr) (time.Duration, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	begun := time.Now()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: echo, Addr: peer.As4()}); err != unix.EINPROGRESS {
		return 0, fmt.Errorf("cannot begin to connect: %w", err)
	}
	err = await(fd, unix.POLLOUT)
	took := time.Since(begun)
	if err != nil {
		return 0, err
	}
	if errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || errno != 0 {
		return 0, cmp.Or(err, error(unix.Errno(errno)))
	}
	if err := errors.Join(unix.Shutdown(fd, unix.SHUT_WR), await(fd, unix.POLLIN)); err != nil {
		return 0, err
	}
	var buf [1]byte
	if n, err := unix.Read(fd, buf[:]); n != 0 || err != nil {
		return 0, fmt.Errorf("no end of the connection, but %d bytes, %v", n, err)
	}
	return took, nil
}

func await(fd int, events int16) error {
	for deadline := time.Now().Add(patience); ; {
		left := time.Until(deadline)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, int(max(left, 0)/time.Millisecond))
		switch {
		case err == unix.EINTR && left > 0: // the runtime's own signals
		case err != nil:
			return err
		case n == 0:
			return os.ErrDeadlineExceeded
		default:
			return nil
		}
	}
}

func echoes(peer netip.Addr, n int) (time.Duration, error) {
	conn, err := dial(peer, echo)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	return times(n, func() (time.Duration, error) { return echoOnce(conn) })
}

func echoOnce(conn net.Conn) (time.Duration, error) {
	buf := []byte{'x'}
	begun := time.Now()
	if _, err := conn.Write(buf); err != nil {
		return 0, err
	}
	_, err := io.ReadFull(conn, buf)
	return time.Since(begun), err
}

// crowd holds the connections until all are there or have failed.
func crowd(peer netip.Addr, n int) (string, error) {
	var all sync.WaitGroup
	conns := make([]net.Conn, n)
	begun := time.Now()
	for i := range conns {
		all.Go(func() {
			conn, err := dial(peer, echo)
			if err != nil {
				return
			}
			if _, err := echoOnce(conn); err != nil {
				conn.Close()
				return
			}
			conns[i] = conn
		})
	}
	all.Wait()
	took, worked := time.Since(begun), 0
	for _, conn := range conns {
		if conn != nil {
			worked++
			conn.Close()
		}
	}
	return fmt.Sprintf("%d %.4f", worked, milliseconds(took)), nil
}

// watch is an echo that goes on by itself.
type watch struct {
	stop, done chan struct{}
	took       []time.Duration
	err        error
}

func newWatch(peer netip.Addr) (*watch, error) {
	conn, err := dial(peer, echo)
	if err != nil {
		return nil, err
	}
	w := &watch{stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		defer conn.Close()
		for {
			select {
			case <-w.stop:
				return
			default:
			}
			d, err := echoOnce(conn)
			if err != nil {
				w.err = err
				return
			}
			w.took = append(w.took, d)
		}
	}()
	return w, nil
}

func (w *watch) end() (string, error) {
	close(w.stop)
	<-w.done
	if w.err != nil || len(w.took) == 0 {
		return "", cmp.Or(w.err, errors.New("there was no echo"))
	}
	slices.Sort(w.took)
	return fmt.Sprintf("%.4f %.4f %d", milliseconds(w.took[len(w.took)/2]), milliseconds(w.took[len(w.took)-1]), len(w.took)), nil
}
