// Command netprobe is what the tests of the network run inside a guest. It asks for what it
// is told to, all at once, and prints a line for each, "QUESTION = WHAT CAME":
//
//	tcp ADDRESS:PORT           GET / by HTTP
//	udp ADDRESS:PORT           one datagram
//	dns TYPE NAME [ADDRESS]    asks the resolver there, or the guest's own
//	ping ADDRESS               one echo request
//
// What came is the answer, or in one word how it failed; "timeout" is what no refusal may
// look like. "netprobe serve ADDRESS…" answers HTTP and datagrams at ADDRESS:PORT, and HTTP
// at the path of a Unix socket, with the address that was asked.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
)

// patience is for a guest under software emulation; longer than what the kernel waits for
// an address that nobody on its network has.
const patience = 30 * time.Second

func main() {
	if len(os.Args) > 2 && os.Args[1] == "serve" {
		if err := serve(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "netprobe:", err)
			os.Exit(1)
		}
		return
	}
	came := make([]string, len(os.Args)-1)
	var all sync.WaitGroup
	for i, question := range os.Args[1:] {
		all.Go(func() { came[i] = probe(question) })
	}
	all.Wait()
	for i, question := range os.Args[1:] {
		fmt.Printf("%s = %s\n", question, came[i])
	}
}

func probe(question string) string {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	answer, err := "", errors.New("what is that?")
	switch words := strings.Fields(question); {
	case len(words) == 2 && words[0] == "tcp":
		answer, err = get(ctx, words[1])
	case len(words) == 2 && words[0] == "udp":
		answer, err = datagram(ctx, words[1])
	case len(words) == 2 && words[0] == "ping":
		answer, err = ping(ctx, words[1])
	case len(words) >= 3 && words[0] == "dns":
		answer, err = lookup(ctx, words[1], words[2], append(words, "")[3])
	}
	if err != nil {
		return failure(err)
	}
	return answer
}

// failure is one word where it can be.
func failure(err error) string {
	var timeout net.Error
	var noName *net.DNSError
	switch {
	case errors.As(err, &noName) && !noName.Timeout():
		return "no address"
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.ECONNRESET):
		return "reset"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EACCES):
		return "unreachable"
	}
	return err.Error()
}

func get(ctx context.Context, at string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at+"/", nil)
	if err != nil {
		return "", err
	}
	res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<10))
	return string(body), err
}

func dial(ctx context.Context, network, at string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, at)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	return conn, conn.SetDeadline(deadline)
}

func datagram(ctx context.Context, at string) (string, error) {
	conn, err := dial(ctx, "udp", at)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("who is there?")); err != nil {
		return "", err
	}
	buf := make([]byte, 1<<10)
	n, err := conn.Read(buf)
	return string(buf[:n]), err
}

// lookup asks by UDP, and by TCP when the answer says so.
func lookup(ctx context.Context, kind, name, server string) (string, error) {
	if server == "" {
		config, err := dns.ClientConfigFromFile("/etc/resolv.conf")
		if err != nil {
			return "", err
		}
		if len(config.Servers) == 0 {
			return "", errors.New("resolv.conf has no server")
		}
		server = config.Servers[0]
	}
	question := new(dns.Msg)
	question.SetQuestion(dns.Fqdn(name), dns.StringToType[kind])
	client := &dns.Client{Net: "udp", Timeout: patience}
	answer, _, err := client.ExchangeContext(ctx, question, net.JoinHostPort(server, "53"))
	if err == nil && answer.Truncated {
		client.Net = "tcp"
		answer, _, err = client.ExchangeContext(ctx, question, net.JoinHostPort(server, "53"))
	}
	if err != nil {
		return "", err
	}
	var addresses []string
	for _, rr := range answer.Answer {
		if a, ok := rr.(*dns.A); ok {
			addresses = append(addresses, a.A.String())
		} else {
			addresses = append(addresses, rr.String())
		}
	}
	slices.Sort(addresses)
	code := dns.RcodeToString[answer.Rcode]
	if len(addresses) > 8 {
		return fmt.Sprintf("%s %d records by %s", code, len(addresses), client.Net), nil
	}
	return strings.Join(append([]string{code}, addresses...), " "), nil
}

// ping needs no rights, see icmp(7). The kernel sets identifier and checksum.
func ping(ctx context.Context, to string) (string, error) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, syscall.IPPROTO_ICMP)
	if err != nil {
		return "", err
	}
	socket := os.NewFile(uintptr(fd), "icmp")
	defer socket.Close()
	addr := &syscall.SockaddrInet4{}
	copy(addr.Addr[:], net.ParseIP(to).To4())
	if err := syscall.Connect(fd, addr); err != nil {
		return "", err
	}
	deadline, _ := ctx.Deadline()
	if err := socket.SetDeadline(deadline); err != nil {
		return "", err
	}
	if _, err := socket.Write([]byte{8, 0, 0, 0, 0, 0, 0, 1, 'h', 'i'}); err != nil {
		return "", err
	}
	buf := make([]byte, 1<<10)
	n, err := socket.Read(buf)
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = context.DeadlineExceeded
		}
		return "", err
	}
	return fmt.Sprintf("answer of type %d with %q", buf[0], buf[8:n]), nil
}

// serve returns only when it cannot go on.
func serve(addresses []string) error {
	ended := make(chan error)
	for _, at := range addresses {
		network := "tcp"
		if strings.HasPrefix(at, "/") {
			network = "unix"
			os.Remove(at)
		}
		l, err := net.Listen(network, at)
		if err != nil {
			return err
		}
		if network == "tcp" {
			packets, err := net.ListenPacket("udp", at)
			if err != nil {
				return err
			}
			go func() { ended <- answerDatagrams(packets) }()
		}
		go func() { ended <- http.Serve(l, http.HandlerFunc(answer)) }()
	}
	return <-ended
}

func answer(w http.ResponseWriter, r *http.Request) {
	at, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	fmt.Fprintf(w, "the guest at %s", at)
}

func answerDatagrams(conn net.PacketConn) error {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		if _, err := conn.WriteTo(append([]byte("the guest got "), buf[:n]...), from); err != nil {
			return err
		}
	}
}
