package vm

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// person is somebody at a terminal in which banger runs. It is banger's controlling
// terminal, as that of a shell's only command is.
type person struct {
	t     testing.TB
	keys  *os.File // the other end of the terminal
	tty   *os.File
	cmd   *exec.Cmd
	ended chan error

	mu     sync.Mutex
	screen bytes.Buffer
}

// sit starts banger in a terminal of that size.
func (h *host) sit(dir string, rows, cols uint16, args ...string) *person {
	h.t.Helper()
	master, tty, err := pty.Open()
	if err != nil {
		h.t.Fatal(err)
	}
	// pty.Open leaves its descriptor in blocking mode: it could not be closed while it
	// is read.
	fd, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	master.Close()
	p := &person{t: h.t, keys: os.NewFile(uintptr(fd), "ptmx"), tty: tty, ended: make(chan error, 1)}
	p.resize(rows, cols)
	p.cmd = exec.Command(filepath.Join(binDir(h.t), "banger"), args...)
	p.cmd.Env, p.cmd.Dir = append(h.env, "TERM=xterm"), dir
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = tty, tty, tty
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := p.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		buf := make([]byte, 4096)
		for {
			n, err := p.keys.Read(buf)
			p.mu.Lock()
			p.screen.Write(buf[:n])
			p.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	go func() { p.ended <- p.cmd.Wait() }()
	h.t.Cleanup(func() {
		p.cmd.Process.Kill()
		p.keys.Close()
		tty.Close()
		<-read
		if h.t.Failed() {
			h.t.Logf("the terminal of banger %s: %q", strings.Join(args, " "), p.screen.String())
		}
	})
	return p
}

func (p *person) resize(rows, cols uint16) {
	p.t.Helper()
	if err := pty.Setsize(p.keys, &pty.Winsize{Rows: rows, Cols: cols}); err != nil {
		p.t.Fatal(err)
	}
}

func (p *person) settings() unix.Termios {
	p.t.Helper()
	s, err := unix.IoctlGetTermios(int(p.tty.Fd()), unix.TCGETS)
	if err != nil {
		p.t.Fatal(err)
	}
	return *s
}

// inside waits until every key goes to the guest.
func (p *person) inside() {
	p.t.Helper()
	waitFor(p.t, bootTimeout, "the terminal to be the guest's", func() bool { return p.settings().Lflag&unix.ICANON == 0 })
}

// press types keys. What they show of themselves must not be what is expected next.
func (p *person) press(keys string) {
	p.t.Helper()
	if _, err := p.keys.WriteString(keys); err != nil {
		p.t.Fatal(err)
	}
}

func (p *person) expect(text string) {
	p.t.Helper()
	waitFor(p.t, time.Minute, "the screen to show "+text, func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return bytes.Contains(p.screen.Bytes(), []byte(text))
	})
}

// wait waits for banger's end; the code is -1 when a signal ended it.
func (p *person) wait() int {
	p.t.Helper()
	select {
	case <-p.ended:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(time.Minute):
		p.t.Fatal("banger does not end")
		return -1
	}
}

// loop is a command that says when it runs, runs on, and does what it is told on a signal.
func loop(sig, then string) string {
	return `sh -c 'trap "` + then + `" ` + sig + `; echo up-` + sig + `-$((40+2)); while :; do sleep 0.1; done'`
}

// TestTerminal: a real shell in a real terminal, and what becomes of a command whose
// terminal, or whose banger, goes away.
func TestTerminal(t *testing.T) {
	h := newHost(t)
	repo := newRepo(t, h)

	p := h.sit(filepath.Join(repo, "sub"), 33, 99, "up")
	before := p.settings()
	p.inside()
	p.press("echo size-$(stty size | tr ' ' x)- on-$(tty | cut -c 1-9)- term-$TERM-\r")
	p.expect("size-33x99- on-/dev/pts/- term-xterm-")
	// A new size reaches the guest's terminal, and the program in it.
	p.press(loop("WINCH", "stty size; exit 3") + "; echo code-$?-\r")
	p.expect("up-WINCH-42")
	p.resize(44, 120)
	p.expect("44 120\r\n")
	p.expect("code-3-")
	// Ctrl-C is a key of the guest's.
	p.press(loop("INT", "exit 9") + "; echo code-$?-\r")
	p.expect("up-INT-42")
	p.press("\x03")
	p.expect("code-9-")
	p.press("exit 7\r")
	if code := p.wait(); code != 7 {
		t.Errorf("the shell's exit code became %d", code)
	}
	if after := p.settings(); after != before {
		t.Errorf("the terminal was %+v, is %+v", before, after)
	}
	p.expect("shop goes on running; banger stop shop stops it")

	hangUps(t, h)
	// Without a terminal of one's own: the output's is made, and a pipe is not put
	// through it.
	if r := h.try("exec", "-t", "shop", "sh", "-c", "test -t 1 && ! test -t 0 && stty size <&1"); r != (result{stdout: "24 80\r\n"}) {
		t.Errorf("exec -t without a terminal: %s", r)
	}
	if r := h.in("", strings.NewReader("x"), "exec", "-t", "-i", "shop", "cat"); r.code != 125 || !strings.Contains(r.stderr, "hint: banger exec -i, without -t") {
		t.Errorf("exec -t -i with a pipe: %s", r)
	}
}

// hangUps ends terminals and bangers in the midst of a command.
func hangUps(t *testing.T, h *host) {
	for name, end := range map[string]func(p *person){
		"closed": func(p *person) {
			p.keys.Close()
			if code := p.wait(); code != 130 {
				t.Errorf("closed: exit code %d", code)
			}
		},
		"killed": func(p *person) { p.cmd.Process.Kill() },
		"ended": func(p *person) {
			p.cmd.Process.Signal(syscall.SIGTERM)
			if code := p.wait(); code != 130 {
				t.Errorf("ended: exit code %d", code)
			}
			if p.settings().Lflag&unix.ICANON == 0 {
				t.Error("ended: the terminal is still raw")
			}
		},
	} {
		// As an interactive shell has it: the program is in a process group of its own.
		file := "/tmp/" + name
		script := "set -m; " + loop("HUP", "echo hup > "+file+"; exit") + " & echo $! $$ > " + file + ".pids; fg"
		p := h.sit("", 24, 80, "exec", "-t", "-i", "shop", "sh", "-c", script)
		p.inside()
		p.expect("up-HUP-42")
		waitFor(t, bootTimeout, "the pids", func() bool { return h.try("exec", "shop", "grep", " ", file+".pids").code == 0 })
		end(p)
		waitFor(t, bootTimeout, name+": the guest's processes to see the hang-up and end", func() bool {
			r := h.try("exec", "shop", "sh", "-c", "for p in $(cat "+file+".pids); do test ! -e /proc/$p || exit 1; done; cat "+file)
			return r == result{stdout: "hup\n"}
		})
	}
}

// TestTerminalOfRun: the VM of run --rm goes with the terminal of its shell.
func TestTerminalOfRun(t *testing.T) {
	h := newHost(t)
	p := h.sit("", 24, 80, "run", "--rm", "--name", "brief")
	p.inside()
	p.press("echo in-$(hostname)-\r")
	p.expect("in-brief-")
	if v := h.show("brief"); v.State != "RUNNING" {
		t.Errorf("brief is %s", v.State)
	}
	p.keys.Close()
	p.wait()
	waitFor(t, time.Minute, "the VM to be gone", func() bool { return h.ok("ps", "-q") == "" })
	if entries, _ := os.ReadDir(filepath.Join(h.dir, "vms")); len(entries) != 0 {
		t.Errorf("left in vms/: %v", entries)
	}
}
