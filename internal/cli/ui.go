package cli

import (
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/term"
)

// ui is stderr. Everything that is not data goes through it:
//
//   - notes and progress, which --quiet drops, and errors, which it does not;
//   - on a terminal progress is one line that is rewritten and erased before anything
//     else is printed; otherwise it is one plain line per step;
//   - lines have no capital and no full stop; errors begin with "banger: ".
type ui struct {
	mu       sync.Mutex
	w        io.Writer
	terminal bool
	quiet    bool
	line     string // the progress line that stands on the terminal
}

func newUI(w io.Writer) *ui { return &ui{w: w, terminal: isTerminal(w)} }

// isTerminal asks a stream of any kind.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

const eraseLine = "\r\x1b[K"

// print writes one message as it is.
func (u *ui) print(message string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.eraseLocked()
	fmt.Fprintln(u.w, message)
}

// note tells something that nobody has to know.
func (u *ui) note(format string, args ...any) {
	if !u.quiet {
		u.print(clean(fmt.Sprintf(format, args...)))
	}
}

// Write is for cobra, which prints to a writer.
func (u *ui) Write(p []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.eraseLocked()
	return u.w.Write(p)
}

// rewrite replaces the progress line; the terminal is narrower than it: it is cut.
func (u *ui) rewrite(line string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.quiet || !u.terminal || line == u.line {
		return
	}
	if width := u.width(); width > 1 && len(line) >= width {
		line = line[:width-1]
	}
	fmt.Fprint(u.w, eraseLine+line)
	u.line = line
}

func (u *ui) width() int {
	if f, ok := u.w.(*os.File); ok {
		if width, _, err := term.GetSize(int(f.Fd())); err == nil {
			return width
		}
	}
	return 80
}

// clear takes the progress line away.
func (u *ui) clear() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.eraseLocked()
}

func (u *ui) eraseLocked() {
	if u.line != "" {
		fmt.Fprint(u.w, eraseLine)
		u.line = ""
	}
}

// raw passes on what an attached command writes to its stderr.
func (u *ui) raw(p []byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.eraseLocked()
	u.w.Write(p) // stderr that nobody reads is no reason to end the command
}
