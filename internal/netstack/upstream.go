package netstack

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The times and sizes of asking the host's resolvers. upstreamUDP is the size that passes
// unfragmented nearly everywhere (the DNS flag day of 2020).
const (
	upstreamServers  = 3 // as resolv.conf(5)
	upstreamRounds   = 2
	upstreamAttempt  = 2 * time.Second
	upstreamOverall  = 5 * time.Second
	upstreamSilence  = 30 * time.Second // for which a server that was silent is asked last
	upstreamInFlight = 256
	upstreamTCP      = 16 // answers of 64 KiB that are in memory at once
	upstreamUDP      = 1232
	upstreamStrays   = 64 // packets that answer something else, per attempt
	resolvConfLook   = time.Second
	resolvConfLimit  = 64 << 10
)

var (
	errNoResolver   = errors.New("the host has no resolver")
	errUnreachable  = errors.New("the host cannot reach its resolver")
	errNoAnswer     = errors.New("the host's resolver does not answer")
	errBusy         = errors.New("too many questions are open")
	errNotTheAnswer = errors.New("the answer is to another question")
)

// upstream asks the resolvers of the host's resolv.conf, which it reads again when it has
// changed. It does nothing while nobody asks.
type upstream struct {
	path  string
	slots chan struct{}
	tcp   chan struct{}

	mu      sync.Mutex
	looked  time.Time
	seen    os.FileInfo
	servers []netip.AddrPort
	silent  map[netip.AddrPort]time.Time // until when they are asked last
}

func newUpstream(path string) *upstream {
	return &upstream{path: path, silent: make(map[netip.AddrPort]time.Time), slots: make(chan struct{}, upstreamInFlight), tcp: make(chan struct{}, upstreamTCP)}
}

// current returns the resolvers of now.
func (u *upstream) current() []netip.AddrPort {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := time.Now()
	if !u.looked.IsZero() && now.Sub(u.looked) < resolvConfLook {
		return u.servers
	}
	u.looked = now
	info, err := os.Stat(u.path)
	if err != nil || !info.Mode().IsRegular() {
		u.seen, u.servers = nil, nil
		return nil
	}
	if u.seen != nil && os.SameFile(u.seen, info) && u.seen.ModTime().Equal(info.ModTime()) && u.seen.Size() == info.Size() {
		return u.servers
	}
	file, err := os.Open(u.path)
	if err != nil {
		u.seen, u.servers = nil, nil
		return nil
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, resolvConfLimit))
	if err != nil {
		u.seen, u.servers = nil, nil
		return nil
	}
	u.seen, u.servers = info, parseResolvConf(data)
	return u.servers
}

// inOrder returns servers with those last that were silent. One whose time is over stands
// in its place again for one question, while others still ask it last: if it is silent
// still, only that one waits.
func (u *upstream) inOrder(servers []netip.AddrPort) []netip.AddrPort {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := time.Now()
	var first, last []netip.AddrPort
	for _, server := range servers {
		until, silent := u.silent[server]
		switch {
		case silent && now.Before(until):
			last = append(last, server)
			continue
		case silent:
			u.silent[server] = now.Add(upstreamAttempt)
		}
		first = append(first, server)
	}
	return append(first, last...)
}

// heard notes that a server has spoken, or that it has not.
func (u *upstream) heard(server netip.AddrPort, spoke bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if delete(u.silent, server); spoke {
		return
	}
	maps.DeleteFunc(u.silent, func(old netip.AddrPort, _ time.Time) bool { return !slices.Contains(u.servers, old) })
	u.silent[server] = time.Now().Add(upstreamSilence)
}

// parseResolvConf finds the nameservers of resolv.conf(5). The port is 53, or that of
// [ADDRESS]:PORT, as OpenBSD writes it.
func parseResolvConf(data []byte) (servers []netip.AddrPort) {
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() && len(servers) < upstreamServers {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		server, err := netip.ParseAddrPort(fields[1])
		if addr, errAddr := netip.ParseAddr(fields[1]); errAddr == nil {
			server, err = netip.AddrPortFrom(addr, 53), nil
		} else if a, port, ok := strings.Cut(strings.TrimPrefix(fields[1], "["), "]:"); ok && err != nil {
			server, err = netip.ParseAddrPort(a + ":" + port)
		}
		if err == nil && server.Port() != 0 && !slices.Contains(servers, server) {
			servers = append(servers, server)
		}
	}
	return servers
}

// query is what the guest wants to know from the host's resolver.
type query struct {
	question          dnsQuestion
	dnssec, unchecked bool // the bits DO and CD
	authentic         bool // the bit AD: it understands it in the answer
}

// message is q as it is sent, and what its answer is known by. Nothing else of the guest's
// packet passes, its address least of all, so every option is ours.
func (q query) message(edns bool) (m *dnsMessage, packed []byte) {
	var id [2]byte
	rand.Read(id[:])
	// A guest that asks for no recursion would only learn what others asked for.
	m = &dnsMessage{id: binary.BigEndian.Uint16(id[:]), bits: bitRecursionDesired, question: q.question}
	if q.unchecked {
		m.bits |= bitUnchecked
	}
	if q.authentic {
		m.bits |= bitAuthentic
	}
	var opt *dnsRecord
	if edns {
		opt = newOPT(upstreamUDP, 0, q.dnssec)
	}
	return m, m.pack(dnsMost, opt)
}

// unreachable is an error with the servers that it is about.
type unreachable struct {
	servers []netip.AddrPort
	cause   error
}

func (e *unreachable) Error() string { return e.cause.Error() }
func (e *unreachable) Unwrap() error { return e.cause }

// ask returns the first usable answer, or the last one that is none. It ends at once when
// no server is there.
func (u *upstream) ask(ctx context.Context, q query) (*dnsMessage, error) {
	select {
	case u.slots <- struct{}{}:
		defer func() { <-u.slots }()
	default:
		return nil, errBusy
	}
	servers := u.current()
	if len(servers) == 0 {
		return nil, &unreachable{cause: errNoResolver}
	}
	ctx, cancel := context.WithTimeout(ctx, upstreamOverall)
	defer cancel()
	var last *dnsMessage
	cause := errUnreachable
	left := u.inOrder(servers)
	for range upstreamRounds {
		again := left[:0]
		for _, server := range left {
			answer, err := u.askServer(ctx, server, q)
			if ctx.Err() == nil { // else it had not all of its time
				u.heard(server, !isTimeout(err))
			}
			switch {
			case err == nil && usable(answer):
				return answer, nil
			case err == nil:
				last = answer
			case ctx.Err() != nil || isTimeout(err):
				cause = errNoAnswer
				again = append(again, server)
			case !isUnreachable(err):
				cause = errNoAnswer
			}
			if ctx.Err() != nil {
				break
			}
		}
		left = again
		// One server has spoken: the others' silence is no reason to wait longer.
		if len(left) == 0 || last != nil || ctx.Err() != nil {
			break
		}
	}
	if last != nil {
		return last, nil
	}
	return nil, &unreachable{servers: servers, cause: cause}
}

func usable(m *dnsMessage) bool {
	return m.rcode == rcodeSuccess || m.rcode == rcodeNameError
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func isUnreachable(err error) bool {
	for _, errno := range []error{
		syscall.ECONNREFUSED, syscall.ENETUNREACH, syscall.EHOSTUNREACH, syscall.ENETDOWN,
		syscall.EADDRNOTAVAIL, syscall.EACCES, syscall.EPERM, syscall.EINVAL,
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// askServer asks by UDP, by TCP when the answer does not fit, and without EDNS when the
// server does not know it.
func (u *upstream) askServer(ctx context.Context, server netip.AddrPort, q query) (*dnsMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamAttempt)
	defer cancel()
	answer, err := u.askOnce(ctx, server, q, true)
	if err != nil {
		return nil, err
	}
	switch answer.rcode {
	case rcodeFormatError, rcodeNotImplemented, rcodeBadVersion:
		return u.askOnce(ctx, server, q, false)
	}
	return answer, nil
}

func (u *upstream) askOnce(ctx context.Context, server netip.AddrPort, q query, edns bool) (*dnsMessage, error) {
	answer, err := u.exchange(ctx, "udp", server, q, edns)
	if err == nil && answer.truncated() {
		return u.exchangeTCP(ctx, server, q, edns)
	}
	return answer, err
}

func (u *upstream) exchangeTCP(ctx context.Context, server netip.AddrPort, q query, edns bool) (*dnsMessage, error) {
	select {
	case u.tcp <- struct{}{}:
		defer func() { <-u.tcp }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return u.exchange(ctx, "tcp", server, q, edns)
}

// exchange opens a socket for one question, so that the kernel picks a new port each
// time, and connected, so that it takes packets from the server only.
func (u *upstream) exchange(ctx context.Context, network string, server netip.AddrPort, q query, edns bool) (*dnsMessage, error) {
	m, packed := q.message(edns)
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, server.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if network == "tcp" {
		if _, err := conn.Write(frame(packed)); err != nil {
			return nil, err
		}
		packet, err := readFrame(conn, dnsMost)
		if err != nil {
			return nil, err
		}
		answer, err := parseAnswer(packet, m)
		if err == nil && answer.truncated() {
			err = errors.New("an answer by TCP is cut short")
		}
		return answer, err
	}
	if _, err := conn.Write(packed); err != nil {
		return nil, err
	}
	buffer := make([]byte, 4096)
	for range upstreamStrays {
		n, err := conn.Read(buffer)
		if err != nil {
			return nil, err
		}
		answer, err := parseAnswer(buffer[:n], m)
		if !errors.Is(err, errNotTheAnswer) {
			return answer, err
		}
	}
	return nil, errNotTheAnswer
}

// frame puts the length before a message, as DNS by TCP has it (RFC 1035, 4.2.2).
func frame(message []byte) []byte {
	return append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(message)), uint16(len(message))), message...)
}

func readFrame(r io.Reader, most int) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(length[:]))
	if n > most {
		return nil, fmt.Errorf("a message of %d bytes is too long", n)
	}
	message := make([]byte, n)
	_, err := io.ReadFull(r, message)
	return message, err
}
