// Package hostcmd runs one command of the host: argv only, no shell, a small known
// environment, bounded output, and an end. A command is its whole process group:
// the group is killed when ctx ends, SIGTERM first so that a tool like mmdebstrap
// can clean up and SIGKILL after 5 s, and whatever is left of it is killed when
// the command itself has ended. A process that made a group or session of its own
// is not followed.
//
// A command does not outlive the daemon, also one killed with SIGKILL. Two things
// see to that, since the one reaches only the command itself and the other not its
// first instructions. The kernel sends it SIGTERM when the thread that forked it
// ends (Pdeathsig), so a goroutine stays locked to that thread for the command's
// time. And the group shares the read end of a pipe that is set to send SIGTERM to
// the group (F_SETOWN, F_SETSIG, O_ASYNC, see fcntl(2)) when its other end, which
// only the daemon has, is closed: mmdebstrap itself ignores SIGTERM and waits for
// its children, which count on getting the signal too. Two limits: nobody is left to
// send SIGKILL then, so a command that ignores SIGTERM runs to its end; and the
// kernel sends the group's signal with the daemon's uid alone, so a process under
// another uid (mmdebstrap --mode=unshare maps subuids) runs on until it writes to a
// pipe that the daemon had. While the daemon lives, it reaches those too: who made a
// user namespace may kill in it.
package hostcmd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// KillAfter is how long a command has between SIGTERM and SIGKILL.
	KillAfter = 5 * time.Second
	// MaxCapture bounds captured standard output, in bytes; more is an error.
	MaxCapture = 64 << 20
	// MaxStderr bounds what is kept of standard error, in bytes: the end of it.
	MaxStderr = 64 << 10
)

// Command is one command to run.
type Command struct {
	// Argv is the program and its arguments. A program without a slash is looked up
	// by LookPath.
	Argv []string
	// Env is the complete environment; nil is Env().
	Env []string
	// Dir is the working directory; empty is the daemon's.
	Dir string
	// Stdin nil is /dev/null for Run, and a pipe for Start. A command that ends does not wait for a Read of Stdin
	// that is under way.
	Stdin io.Reader
	// Stdout nil is captured by Run, and a pipe for Start. When writing to it fails,
	// the command is killed and the failure returned.
	Stdout io.Writer
	// Stderr gets a copy of standard error as it comes, nil for none. Its errors are
	// ignored.
	Stderr io.Writer
}

// Error is a command that failed. Its text is like
//
//	git apply: exit status 1: error: patch does not apply
type Error struct {
	Argv []string
	// ExitCode is -1 when the command did not exit: it was not started, or a signal
	// ended it.
	ExitCode int
	// Stderr is the end of its standard error, at most MaxStderr bytes, as it came.
	Stderr string
	// Err is the cause: ctx's error when ctx ended the command, a *NotInstalledError
	// when there is no such program, else an *exec.ExitError or an errno.
	Err error
}

func (e *Error) Error() string {
	text := title(e.Argv) + ": " + e.Err.Error()
	if line := lastLine(e.Stderr); line != "" {
		text += ": " + line
	}
	return text
}

func (e *Error) Unwrap() error { return e.Err }

// Run runs the command to its end and returns its standard output, nil when
// Command.Stdout is set. An error is an *Error; the output so far comes with it.
func Run(ctx context.Context, c Command) ([]byte, error) {
	var captured *capture
	if c.Stdout == nil {
		captured = &capture{}
		c.Stdout = captured
	}
	p, err := start(ctx, c, false)
	if err != nil {
		return nil, err
	}
	err = p.Wait()
	if captured == nil {
		return nil, err
	}
	return captured.Bytes(), err
}

// capture is a buffer that refuses to grow for ever.
type capture struct{ bytes.Buffer }

func (c *capture) Write(p []byte) (int, error) {
	if c.Len()+len(p) > MaxCapture {
		return 0, fmt.Errorf("more than %d MiB of output", MaxCapture>>20)
	}
	return c.Buffer.Write(p)
}

// Env is what a command gets of the daemon's environment: PATH with the system
// directories added, HOME, USER, LOGNAME, TMPDIR, XDG_*, and the C.UTF-8 locale so
// that messages are in one language. Nothing else passes, least of all GIT_*.
// extra, KEY=VALUE, comes last and wins.
func Env(extra ...string) []string {
	env := []string{"PATH=" + searchPath(), "LANG=C.UTF-8", "LC_ALL=C.UTF-8"}
	for _, kv := range os.Environ() {
		key, _, _ := strings.Cut(kv, "=")
		switch {
		case key == "HOME", key == "USER", key == "LOGNAME", key == "TMPDIR", strings.HasPrefix(key, "XDG_"):
			env = append(env, kv)
		}
	}
	return append(env, extra...)
}

// searchPath is the PATH of commands. mkfs.ext4 and its like lie in directories
// that a user's PATH often lacks; a relative directory would mean another program
// in each working directory.
func searchPath() string {
	var dirs []string
	seen := map[string]bool{}
	usual := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, dir := range filepath.SplitList(os.Getenv("PATH") + ":" + usual) {
		if filepath.IsAbs(dir) && !seen[dir] {
			seen[dir] = true
			dirs = append(dirs, dir)
		}
	}
	return strings.Join(dirs, ":")
}

// LookPath finds a program where Run looks for it. The error of a name is a
// *NotInstalledError.
func LookPath(name string) (string, error) {
	if strings.Contains(name, "/") {
		path, err := exec.LookPath(name)
		var cause unix.Errno
		if errors.As(err, &cause) {
			return "", fmt.Errorf("cannot execute %s: %w", name, cause)
		}
		return path, err
	}
	for _, dir := range filepath.SplitList(searchPath()) {
		path, err := exec.LookPath(filepath.Join(dir, name))
		if err == nil {
			return path, nil
		}
	}
	return "", &NotInstalledError{Program: name}
}

// title is the program and, where the second word is one, its subcommand.
func title(argv []string) string {
	if len(argv) == 0 {
		return "command"
	}
	name := filepath.Base(argv[0])
	rest := argv[1:]
	for name == "git" && len(rest) > 0 && strings.HasPrefix(rest[0], "-") {
		skip := 1
		if (rest[0] == "-C" || rest[0] == "-c") && len(rest) > 1 {
			skip = 2
		}
		rest = rest[skip:]
	}
	if len(rest) > 0 && isWord(rest[0]) {
		name += " " + rest[0]
	}
	return name
}

func isWord(s string) bool {
	for _, r := range s {
		if (r < 'a' || r > 'z') && r != '-' {
			return false
		}
	}
	return s != "" && s[0] != '-'
}

// lastLine is the last line with anything on it, fit for a message.
func lastLine(s string) string {
	lines := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' })
	for i := len(lines) - 1; i >= 0; i-- {
		line := strings.TrimSpace(strings.Map(printable, strings.ToValidUTF8(lines[i], "?")))
		const most = 400
		if len(line) > most {
			line = strings.ToValidUTF8(line[:most], "") + " …"
		}
		if line != "" {
			return line
		}
	}
	return ""
}

func printable(r rune) rune {
	if r < ' ' || (r >= 0x7f && r < 0xa0) {
		return -1
	}
	return r
}

var errNoCommand = errors.New("no command given")
