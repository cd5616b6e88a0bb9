// Command fakevmm stands in for a VMM and its guest: a process under the real shim
// with the real agent on the other side of run/agent.sock, whose commands run on this
// machine as the current user. There is no isolation: it is for tests.
//
// It runs in the VM's directory as a VMM does. stdout is the console. What the guest
// has for a disk is guest/ there: guest/home is the home of its users and lives as
// long as the VM; the file "disk" must be there and is not touched. Commands find
// poweroff and reboot in their PATH. All processes of the guest end with it, also
// when it is killed.
//
// How it behaves can be changed while it runs, see fake.Scenario.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"banger/internal/daemon/driver/fake"
	"banger/internal/guest/agent"
	"banger/internal/guest/wire"
)

func main() {
	agent.RunChild()
	if os.Args[0] == watcherName {
		watch(os.Args[1])
		return
	}
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "fakevmm: %v\n", err)
		os.Exit(1)
	}
}

// machine is the VMM and its guest.
type machine struct {
	host, name string // for scenario
	dir        string
	config     wire.Config
	watcher    *os.File // open as long as the machine runs

	console sync.Mutex // one line at a time; held for ever by the last one
}

func run() error {
	m := new(machine)
	flag.StringVar(&m.host, "host", "", "directory of the fake host")
	id := flag.String("id", "", "id of the VM")
	flag.StringVar(&m.name, "name", "", "name of the VM")
	disk := flag.String("disk", "", "root disk")
	initrd := flag.String("initrd", "", "initramfs, for the guest's configuration")
	flag.Parse()

	if m.scenario() == fake.Die {
		return fmt.Errorf("cannot set up guest memory: %w", syscall.ENOMEM)
	}
	if f, err := os.OpenFile(*disk, os.O_RDWR, 0); err != nil {
		return err
	} else if err := f.Close(); err != nil {
		return err
	}
	// The shim's lock must end with this process, not with a command of the guest.
	if err := closeOnExec(); err != nil {
		return err
	}
	var err error
	if m.dir, err = os.Getwd(); err != nil {
		return err
	}
	if m.config, err = readConfig(*initrd); err != nil {
		return fmt.Errorf("cannot read the guest's configuration: %w", err)
	}
	if m.config.Identity.ID != *id {
		return fmt.Errorf("the configuration is that of %q, not of %q", m.config.Identity.ID, *id)
	}
	if err := m.makeGuest(); err != nil {
		return err
	}
	if m.watcher, err = startWatcher(m.mark()); err != nil {
		return err
	}
	return m.boot()
}

// boot serves the host until the guest ends.
func (m *machine) boot() error {
	m.print("fake guest %s boots", m.config.Identity.Hostname)
	port := newPort()
	agentSocket, err := net.Listen("unix", fake.AgentSocket)
	if err != nil {
		return err
	}
	go port.accept(agentSocket)
	a := agent.New(agent.Options{Config: m.config, System: m, Root: filepath.Join(m.dir, "guest")})
	go wire.ServeGuest(port, m.config.Magic, func(conn net.Conn) {
		if m.scenario() == fake.Stall {
			return // the stream stays open and unanswered
		}
		a.Handle(conn)
	})

	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2)
	control, err := net.Listen("unix", fake.ControlSocket)
	if err != nil {
		return err
	}
	go m.control(control)
	m.print("the agent is up")
	for sig := range signals {
		switch sig {
		case syscall.SIGTERM: // as QEMU does
			m.end("")
		case syscall.SIGUSR1: // the guest's own doing, whatever becomes of requests
			m.end("poweroff")
		case syscall.SIGUSR2:
			m.end("reboot")
		}
	}
	return nil
}

// control answers the VMM's own socket: a line "up" for each connection; "poweroff"
// presses the button.
func (m *machine) control(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			scenario := m.scenario() // as it is when the button is pressed
			io.WriteString(conn, "up\n")
			line, err := io.ReadAll(io.LimitReader(conn, 100))
			if err == nil && string(line) == "poweroff\n" && scenario != fake.Stall {
				m.Shutdown("poweroff")
			}
		}()
	}
}

// Ready is the agent's question to the system.
func (m *machine) Ready(ctx context.Context) (wire.Ready, error) {
	switch m.scenario() {
	case fake.Degraded:
		return wire.Ready{System: "degraded"}, nil
	case fake.NeverReady:
		<-ctx.Done()
		return wire.Ready{}, ctx.Err()
	}
	return wire.Ready{System: "running"}, nil
}

// Shutdown ends the guest, unless the scenario has it otherwise.
func (m *machine) Shutdown(verb string) error {
	switch m.scenario() {
	case fake.NoShutdown:
		m.print("the system does not go down")
		return nil
	case fake.SlowShutdown:
		m.print("the system goes down slowly")
		time.Sleep(fake.SlowShutdownTime)
	}
	m.end(verb)
	return nil
}

// SetClock takes the time and leaves it at that.
func (m *machine) SetClock(t time.Time) error {
	m.print("the clock is set to %s", t.UTC().Format(time.RFC3339))
	return nil
}

// end ends the process. An intent is the last line of the console.
func (m *machine) end(intent string) {
	killGuest(m.mark())
	m.console.Lock()
	if intent != "" {
		fmt.Printf("%s%s\n", wire.IntentPrefix, intent)
	}
	os.Exit(0)
}

func (m *machine) print(format string, args ...any) {
	m.console.Lock()
	defer m.console.Unlock()
	fmt.Printf(format+"\n", args...)
}

// scenario is how to behave now.
func (m *machine) scenario() fake.Scenario { return fake.ReadScenario(m.host, m.name) }

// makeGuest makes the files that the agent reads of a guest, and a home.
func (m *machine) makeGuest() error {
	guest := filepath.Join(m.dir, "guest")
	for _, name := range []string{"etc", "home", "bin"} {
		if err := os.MkdirAll(filepath.Join(guest, name), 0o755); err != nil {
			return err
		}
	}
	entry := func(name string) string {
		return fmt.Sprintf("%s:x:%d:%d::%s/home:/bin/sh\n", name, os.Geteuid(), os.Getegid(), guest)
	}
	passwd := entry("root")
	if u := m.config.User; u != nil && u.Name != "root" {
		passwd += entry(u.Name)
	}
	path := strings.Join([]string{guest + "/bin", os.Getenv("PATH"), "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}, ":")
	files := map[string]string{
		"etc/passwd":      passwd,
		"etc/group":       fmt.Sprintf("root:x:%d:\n", os.Getegid()),
		"etc/environment": "PATH=" + path + "\n" + m.mark() + "\n",
		"bin/poweroff":    fmt.Sprintf("#!/bin/sh\nexec kill -USR1 %d\n", os.Getpid()),
		"bin/reboot":      fmt.Sprintf("#!/bin/sh\nexec kill -USR2 %d\n", os.Getpid()),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(guest, name), []byte(text), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// closeOnExec marks all descriptors above stderr.
func closeOnExec() error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		var fd int
		if _, err := fmt.Sscan(e.Name(), &fd); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
	return nil
}

// mark is the variable by which all processes of this boot of the guest are found: the
// watcher of one that died must not end those of the next.
func (m *machine) mark() string {
	return fmt.Sprintf("BANGER_FAKE_GUEST=%s#%d", m.dir, os.Getpid())
}

// killGuest ends all processes with a mark.
func killGuest(mark string) {
	for range 100 { // a process may be made while the others are ended
		found := false
		environs, _ := filepath.Glob("/proc/[0-9]*/environ")
		for _, path := range environs {
			env, err := os.ReadFile(path)
			var pid int
			if err != nil || !bytes.Contains(append([]byte{0}, env...), []byte("\x00"+mark+"\x00")) {
				continue
			}
			if _, err := fmt.Sscanf(path, "/proc/%d/", &pid); err == nil && pid != os.Getpid() {
				found = syscall.Kill(pid, syscall.SIGKILL) == nil || found
			}
		}
		if !found {
			return
		}
		time.Sleep(time.Millisecond)
	}
}
