package fakeguest

import (
	"io"
	"net"
	"sync"
	"testing"
)

// Service is a service of the host at a free port of address that treats each connection,
// until the test ends.
func Service(t testing.TB, address string, treat func(net.Conn)) (port uint16) {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	var mu sync.Mutex
	open := make(map[net.Conn]bool)
	work.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[conn] = true
			mu.Unlock()
			work.Go(func() {
				treat(conn)
				conn.Close()
				mu.Lock()
				delete(open, conn)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for conn := range open {
			conn.Close()
		}
		mu.Unlock()
		work.Wait()
	})
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// Echo sends back what comes, and the end too.
func Echo(conn net.Conn) {
	io.Copy(conn, conn)
	conn.(*net.TCPConn).CloseWrite()
}
