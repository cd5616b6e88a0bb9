package vm

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"banger/test/need"
)

// The addresses of the world. 203.0.113.0/24 plays the internet.
const (
	ownAddress    = "203.0.113.2" // of the host
	peerAddress   = "203.0.113.1"
	dnsAddress    = "203.0.113.53"
	lanAddress    = "192.168.50.1"
	otherPrivate  = "10.9.9.9"
	metadata      = "169.254.169.254"
	allowedTest   = "203.0.113.10"
	golangTest    = "203.0.113.11"
	belowGolang   = "203.0.113.12"
	deniedTest    = "203.0.113.13"
	secondPort    = "7778"
	servicePort   = "7777" // of every address, the host's loopback and its own included
	downloadSize  = 4 << 20
	trickleBeat   = 50 * time.Millisecond
	worldPatience = 30 * time.Second
)

// world is two network namespaces with a cable between them, and no way out: "host", where
// banger runs, and "peer", which has all addresses that are not the host's. Each answers
// GET / and datagrams at servicePort with the address that was asked.
type world struct {
	t    testing.TB
	host *namespace
	peer *namespace
	data []byte // of downloads

	mu        sync.Mutex
	downloads map[string]*download
}

// download is one GET that the test follows: /half/NAME stops in the middle until resume is
// closed, /trickle/NAME never ends by itself.
type download struct {
	begun, resume, ended chan struct{}
}

// namespace is held by a process, so that it ends with the test however that ends.
type namespace struct {
	t   testing.TB
	pid int
}

func newWorld(t testing.TB) *world {
	t.Helper()
	need.Need(t, "root")
	need.Need(t, "netns")
	resolvConf := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, resolvConf, "nameserver "+dnsAddress+"\n")
	w := &world{t: t, host: newNamespace(t, resolvConf), peer: newNamespace(t, resolvConf), downloads: make(map[string]*download)}
	w.data = make([]byte, downloadSize)
	rand.NewChaCha8([32]byte{5}).Read(w.data)
	w.host.ip("link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", strconv.Itoa(w.peer.pid))
	w.host.ip("addr", "add", ownAddress+"/24", "dev", "cable")
	for _, a := range []string{peerAddress, dnsAddress, allowedTest, golangTest, belowGolang, deniedTest} {
		w.peer.ip("addr", "add", a+"/24", "dev", "cable")
	}
	for _, a := range []string{lanAddress, otherPrivate, metadata} {
		w.peer.ip("addr", "add", a+"/32", "dev", "cable")
	}
	for _, n := range []*namespace{w.host, w.peer} {
		n.ip("link", "set", "lo", "up")
		n.ip("link", "set", "cable", "up")
	}
	for _, a := range []string{lanAddress, otherPrivate, metadata} {
		w.host.ip("route", "add", a+"/32", "via", peerAddress)
	}
	w.serve(w.host, servicePort, "127.0.0.1", ownAddress)
	everywhere := []string{peerAddress, lanAddress, otherPrivate, metadata, allowedTest, golangTest, belowGolang, deniedTest}
	w.serve(w.peer, servicePort, everywhere...)
	w.serve(w.peer, secondPort, allowedTest)
	w.serveDNS()
	return w
}

func newNamespace(t testing.TB, resolvConf string) *namespace {
	t.Helper()
	cmd := exec.Command("unshare", "--net", "--mount", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && echo ready && exec cat`, resolvConf)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe() // its end is that of the namespace
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("cannot make a namespace: %v %s", err, &stderr)
	}
	return &namespace{t: t, pid: cmd.Process.Pid}
}

// enter is what stands before a command to run it in the namespace.
func (n *namespace) enter() []string {
	return []string{"nsenter", "--target", strconv.Itoa(n.pid), "--net", "--mount", "--"}
}

// run runs a command in the namespace.
func (n *namespace) run(args ...string) string {
	n.t.Helper()
	args = append(n.enter(), args...)
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		n.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (n *namespace) ip(args ...string) { n.t.Helper(); n.run(append([]string{"ip"}, args...)...) }

// do runs f in a thread of the namespace; sockets that it makes stay there.
func (n *namespace) do(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		result <- func() error {
			file, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", n.pid))
			if err != nil {
				return err
			}
			defer file.Close()
			if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			return f()
		}()
	}()
	return <-result
}

func (n *namespace) listen(at string) net.Listener {
	n.t.Helper()
	var l net.Listener
	if err := n.do(func() (err error) { l, err = net.Listen("tcp4", at); return err }); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { l.Close() })
	return l
}

func (n *namespace) listenPacket(at string) net.PacketConn {
	n.t.Helper()
	var c net.PacketConn
	if err := n.do(func() (err error) { c, err = net.ListenPacket("udp4", at); return err }); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	return c
}

func (n *namespace) dial(network, at string) (conn net.Conn, err error) {
	err = n.do(func() (err error) { conn, err = net.DialTimeout(network, at, worldPatience); return err })
	if err == nil {
		err = conn.SetDeadline(time.Now().Add(worldPatience))
	}
	return conn, err
}

// ask is what comes from "tcp" or "udp" at an address, or how it failed.
func (n *namespace) ask(network, at string) string {
	conn, err := n.dial(network, at)
	if err != nil {
		return failed(err)
	}
	defer conn.Close()
	return askOn(conn, network)
}

// askOn is ask by a connection that is there.
func askOn(conn net.Conn, network string) string {
	question := "hello"
	if network != "udp" {
		question = "GET / HTTP/1.0\r\n\r\n"
	}
	if _, err := conn.Write([]byte(question)); err != nil {
		return failed(err)
	}
	if network == "udp" {
		buf := make([]byte, 1<<10)
		n, err := conn.Read(buf)
		if err != nil {
			return failed(err)
		}
		return string(buf[:n])
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return failed(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return failed(err)
	}
	return string(body)
}

func failed(err error) string {
	if errors.Is(err, syscall.ECONNREFUSED) {
		return "refused"
	}
	return "failed: " + err.Error()
}

// serve answers at a port of addresses.
func (w *world) serve(n *namespace, port string, addresses ...string) {
	server := &http.Server{Handler: http.HandlerFunc(w.answer)}
	w.t.Cleanup(func() { server.Close() })
	for _, a := range addresses {
		l, c := n.listen(a+":"+port), n.listenPacket(a+":"+port)
		go server.Serve(l)
		go func() {
			buf := make([]byte, 64<<10)
			for {
				_, from, err := c.ReadFrom(buf)
				if err != nil {
					return
				}
				c.WriteTo([]byte("datagrams at "+c.LocalAddr().String()), from)
			}
		}()
	}
}

func (w *world) answer(rw http.ResponseWriter, r *http.Request) {
	kind, name, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	at, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	switch kind {
	case "half":
		d := w.download(name)
		rw.Header().Set("Content-Length", strconv.Itoa(len(w.data)))
		rw.Write(w.data[:len(w.data)/2])
		rw.(http.Flusher).Flush()
		close(d.begun)
		defer close(d.ended)
		select {
		case <-d.resume:
			rw.Write(w.data[len(w.data)/2:])
		case <-r.Context().Done():
		}
	case "trickle":
		d := w.download(name)
		defer close(d.ended)
		for beat := 0; r.Context().Err() == nil; beat++ {
			fmt.Fprintln(rw, beat)
			rw.(http.Flusher).Flush()
			if beat == 1 {
				close(d.begun)
			}
			time.Sleep(trickleBeat) // the pace of a stream, and nothing waits for it
		}
	case "whole":
		rw.Write(w.data)
	case "":
		fmt.Fprintf(rw, "%s", at)
	default:
		http.NotFound(rw, r)
	}
}

// download is the one of that name, whoever asks for it first.
func (w *world) download(name string) *download {
	w.mu.Lock()
	defer w.mu.Unlock()
	d := w.downloads[name]
	if d == nil {
		d = &download{make(chan struct{}), make(chan struct{}), make(chan struct{})}
		w.downloads[name] = d
	}
	return d
}

// sum is what sha256sum prints about the data of downloads.
func (w *world) sum() string {
	sum := sha256.Sum256(w.data)
	return hex.EncodeToString(sum[:])
}

// zone is what the host's resolver knows.
func zone() map[string][]string {
	return map[string][]string{
		"peer.test": {peerAddress}, "lan.test": {lanAddress}, "rebind.test": {"127.0.0.1", metadata, peerAddress},
		"allowed.test": {allowedTest}, "www.golang.test": {belowGolang}, "golang.test": {golangTest}, "denied.test": {deniedTest},
		"big.test": nil,
	}
}

// bigAnswer is how many addresses big.test has: about as many as a message can hold.
const bigAnswer = 4000

func (w *world) serveDNS() {
	at := dnsAddress + ":53"
	for _, server := range []*dns.Server{{PacketConn: w.peer.listenPacket(at)}, {Listener: w.peer.listen(at)}} {
		datagrams := server.PacketConn != nil
		server.Handler = dns.HandlerFunc(func(rw dns.ResponseWriter, question *dns.Msg) { rw.WriteMsg(resolve(question, datagrams)) })
		started := make(chan struct{})
		server.NotifyStartedFunc = func() { close(started) }
		go server.ActivateAndServe()
		<-started
		w.t.Cleanup(func() { server.Shutdown() })
	}
}

func resolve(question *dns.Msg, datagrams bool) *dns.Msg {
	answer := new(dns.Msg)
	answer.SetReply(question)
	answer.Compress = true
	q := question.Question[0]
	addresses, known := zone()[strings.TrimSuffix(dns.CanonicalName(q.Name), ".")]
	header := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: 60}
	switch {
	case !known:
		answer.Rcode = dns.RcodeNameError
	case q.Qtype == dns.TypeA && addresses == nil:
		for i := range bigAnswer {
			answer.Answer = append(answer.Answer, &dns.A{Hdr: header, A: net.IPv4(198, 51, byte(i>>8), byte(i)).To4()})
		}
	case q.Qtype == dns.TypeA:
		for _, a := range addresses {
			answer.Answer = append(answer.Answer, &dns.A{Hdr: header, A: net.ParseIP(a).To4()})
		}
	case q.Qtype == dns.TypeAAAA:
		answer.Answer = append(answer.Answer, &dns.AAAA{Hdr: header, AAAA: net.ParseIP("2001:db8::1")})
	}
	if datagrams {
		answer.Truncate(dns.MinMsgSize)
	}
	return answer
}
