package cli

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/config"
)

// daemonMode makes the test binary a bangerd: banger starts it as it starts the real
// one.
const daemonMode = "BANGER_CLI_TEST_BANGERD"

// bangerMode, as the value of it, makes the test binary a banger.
const bangerMode = "banger"

func TestMain(m *testing.M) {
	switch mode := os.Getenv(daemonMode); mode {
	case "":
		os.Exit(m.Run())
	case bangerMode:
		os.Exit(Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Environ()))
	case "crash":
		fmt.Fprintln(os.Stderr, "panic: the last words")
		os.Exit(2)
	default:
		os.Exit(runDaemon(nil, os.Stdout, os.Stderr, func(context.Context, bool) (server, error) { return openTiny(mode) }))
	}
}

// tiny is a daemon that can only say what it is. Its lock is as the real one's.
type tiny struct {
	lock   *os.File
	ln     net.Listener
	layout config.Layout
	stop   chan struct{}
	once   sync.Once
}

func openTiny(mode string) (server, error) {
	if mode == "misconfigured" {
		return nil, api.Errorf(api.Invalid, "config.toml:3: unknown key colour").WithHint("banger doctor")
	}
	l := config.Layout{Root: os.Getenv("BANGER_STATE_DIR")}
	// Each start leaves a line.
	log, err := os.OpenFile(l.Root+".starts", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	lock, err := os.OpenFile(l.DaemonLock(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		fmt.Fprintln(log, "busy")
		return nil, api.Errorf(api.Busy, "a bangerd already runs")
	}
	os.Remove(l.Socket())
	ln, err := net.Listen("unix", l.Socket())
	if err != nil {
		return nil, err
	}
	fmt.Fprintln(log, "opened")
	return &tiny{lock: lock, ln: ln, layout: l, stop: make(chan struct{})}, nil
}

func (s *tiny) Serve(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.Handle(bangerv1connect.NewMachineHandler(s))
	mux.Handle(bangerv1connect.NewVMsHandler(bangerv1connect.UnimplementedVMsHandler{}))
	go http.Serve(s.ln, mux)
	select {
	case <-ctx.Done():
	case <-s.stop:
	}
	return nil
}

func (s *tiny) Close() error {
	os.Remove(s.layout.Socket())
	return s.ln.Close()
}

func (s *tiny) Status(context.Context, *bangerv1.StatusRequest) (*bangerv1.StatusResponse, error) {
	// The session id and the descriptors are what the tests look at.
	sid, _ := unix.Getsid(0)
	cwd, _ := os.Getwd()
	build, err := buildOf("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	return &bangerv1.StatusResponse{Version: "tiny", Build: build, Pid: int32(os.Getpid()), StateDir: s.layout.Root,
		Instance: fmt.Sprintf("sid=%v cwd=%s fds=%s ready=%q", sid == os.Getpid(), cwd, strings.Join(descriptors(), " "), os.Getenv(readyFD))}, nil
}

func (s *tiny) Shutdown(context.Context, *bangerv1.ShutdownRequest) (*bangerv1.ShutdownResponse, error) {
	s.once.Do(func() { close(s.stop) })
	return &bangerv1.ShutdownResponse{}, nil
}

func (s *tiny) Doctor(context.Context, *bangerv1.DoctorRequest) (*bangerv1.DoctorResponse, error) {
	return &bangerv1.DoctorResponse{}, nil
}

// descriptors lists what this process has open but sockets and what its runtime opened.
func descriptors() []string {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return []string{err.Error()}
	}
	var out []string
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || strings.HasPrefix(target, "anon_inode:") || strings.HasPrefix(target, "socket:") || strings.HasPrefix(target, "/proc/") {
			continue
		}
		out = append(out, e.Name()+"="+target[strings.LastIndex(target, "/")+1:])
	}
	return out
}
