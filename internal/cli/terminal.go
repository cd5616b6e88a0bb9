package cli

import (
	"io"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// onTerminal tells whether banger talks with a person: stdin and stdout are terminals.
func (a *app) onTerminal() bool { return isTerminal(a.stdin) && isTerminal(a.stdout) }

// isNull tells that stdin is /dev/null, as that of a job that nobody watches is.
func isNull(stdin io.Reader) bool {
	f, ok := stdin.(*os.File)
	if !ok {
		return false
	}
	var null, s unix.Stat_t
	return unix.Stat(os.DevNull, &null) == nil && unix.Fstat(int(f.Fd()), &s) == nil &&
		s.Mode&unix.S_IFMT == unix.S_IFCHR && s.Rdev == null.Rdev
}

// terminalSize is the size of the terminal in characters, 80 × 24 without one.
func (a *app) terminalSize() (cols, rows uint16) {
	for _, stream := range []any{a.stdout, a.stdin} {
		if f, ok := stream.(*os.File); ok {
			if w, h, err := term.GetSize(int(f.Fd())); err == nil && w > 0 && h > 0 {
				return uint16(min(w, 1<<16-1)), uint16(min(h, 1<<16-1))
			}
		}
	}
	return 80, 24
}

// terminal is stdin in raw mode: every key goes to the guest.
type terminal struct {
	fd    int
	state *term.State
}

// openTerminal makes stdin raw; nil when it is no terminal.
func openTerminal(stdin io.Reader) *terminal {
	if !isTerminal(stdin) {
		return nil
	}
	fd := int(stdin.(*os.File).Fd())
	state, err := term.MakeRaw(fd)
	if err != nil {
		return nil
	}
	return &terminal{fd: fd, state: state}
}

// restore gives the terminal back as it was.
func (t *terminal) restore() {
	// When it fails the terminal is gone.
	_ = term.Restore(t.fd, t.state)
}

// changes reports when the terminal has another size.
func (t *terminal) changes() (<-chan os.Signal, func()) {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGWINCH)
	return ch, func() { signal.Stop(ch) }
}
