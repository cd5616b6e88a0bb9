package workspace

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"banger/api"
	"banger/internal/guest/wire"
)

const (
	// quickTime bounds a command in the guest that reads or writes a few files. A guest
	// under software emulation on a loaded machine needs seconds for the slowest.
	quickTime = 2 * time.Minute
	// endTime bounds the clearing up at the end of a job.
	endTime = 5 * time.Second
	// slowTime bounds one that reads or writes the whole repository.
	slowTime = 30 * time.Minute
	// maxOutput bounds what a command in the guest may say, in bytes: the list of the
	// files of half a million is 64 MiB.
	maxOutput = 128 << 20
	maxStderr = 16 << 10
	// maxSaid bounds what git may say of a checkout: a line for each file that it cannot
	// write.
	maxSaid = 1 << 20
	// maxShown is how much of that an error shows, in bytes.
	maxShown = 300
)

// guest runs commands in one VM.
type guest struct {
	dial func(ctx context.Context) (net.Conn, error)
	name string // of the VM, for messages
	user string // whom its commands run as, for messages; empty: whom the image says
}

// command is a process inside. Its argv and paths are valid text: they travel as JSON.
type command struct {
	argv []string
	env  []string
	dir  string // empty: the home directory
	user string // empty: the guest's user
	in   io.Reader
	out  io.Writer // nil: returned by run
	errs *bounded  // standard error, also of a command that succeeds; nil: thrown away
	slow bool
	// finish: when the job ends, the command does not end half way.
	finish bool
}

// guestError is a command inside that failed.
type guestError struct {
	argv   []string
	code   int
	stderr string
}

func (e *guestError) Error() string {
	name := e.argv[0]
	if name == "git" && len(e.argv) > 1 {
		name += " " + e.argv[1]
	}
	text := fmt.Sprintf("%s in the guest: exit status %d", name, e.code)
	lines := strings.FieldsFunc(e.stderr, func(r rune) bool { return r == '\n' || r == '\r' })
	if len(lines) > 0 {
		text += ": " + wire.CleanText(lines[len(lines)-1], maxShown)
	}
	return text
}

func (g guest) run(ctx context.Context, c command) ([]byte, error) {
	limit := quickTime
	if c.slow {
		limit = slowTime
	}
	late := api.Errorf(api.Unresponsive, "%s did not end within %v in the guest", c.argv[0], limit).WithHint("banger stop %s", g.name)
	ctx, cancel := context.WithTimeoutCause(ctx, limit, late)
	defer cancel()
	conn, err := g.dial(ctx)
	if err != nil {
		return nil, err
	}
	var stdout *bounded
	if c.out == nil {
		stdout = &bounded{limit: maxOutput}
		c.out = stdout
	}
	stderr := c.errs
	if stderr == nil {
		stderr = &bounded{limit: maxStderr, drop: true}
	}
	exit, err := wire.Run(ctx, conn, wire.Request{Op: wire.OpExec, Exec: &wire.Exec{
		Argv: c.argv, Env: append([]string{"LC_ALL=C"}, c.env...), Dir: c.dir, User: c.user, Stdin: c.in != nil, Finish: c.finish,
	}}, wire.Stdio{In: c.in, Out: c.out, Err: stderr})
	var refused *wire.Error
	if errors.As(err, &refused) && refused.Code == wire.ErrNotFound && c.argv[0] == "git" {
		return nil, api.Errorf(api.Refused, "there is no git in the guest").WithHint("banger create --image debian-bookworm")
	}
	if errors.As(err, &refused) && refused.Code == wire.ErrNoDir {
		return nil, api.Errorf(api.Refused, "%s is not there in the guest any more", visible(c.dir)).WithHint("banger up")
	}
	if err != nil {
		return nil, err
	}
	var out []byte
	if stdout != nil {
		out = stdout.Bytes()
	}
	if exit.Code == 0 {
		return out, nil
	}
	failed := &guestError{argv: c.argv, code: exit.Code, stderr: stderr.String()}
	if strings.Contains(failed.stderr, "No space left on device") || strings.Contains(failed.stderr, "Disk quota exceeded") {
		return out, g.fullError(failed)
	}
	return out, failed
}

func (g guest) fullError(err error) error {
	return api.Errorf(api.NoSpace, "the disk of %s is full: %w", g.name, err).WithHint("banger exec %s df -h", g.name)
}

// ask is for commands that answer by their exit status: 1 is no.
func (g guest) ask(ctx context.Context, c command) (string, bool, error) {
	out, err := g.run(ctx, c)
	var failed *guestError
	if errors.As(err, &failed) && failed.code == 1 {
		return "", false, nil
	}
	return strings.TrimSuffix(string(out), "\n"), err == nil, err
}

// untar unpacks an archive below dir, as the guest's user.
func (g guest) untar(ctx context.Context, dir string, archive []byte) error {
	ctx, cancel := context.WithTimeout(ctx, quickTime)
	defer cancel()
	conn, err := g.dial(ctx)
	if err != nil {
		return err
	}
	exit, err := wire.Run(ctx, conn, wire.Request{Op: wire.OpUntar, Tree: &wire.Tree{Dir: dir}}, wire.Stdio{In: bytes.NewReader(archive)})
	if err == nil && exit.Code != 0 {
		err = &guestError{argv: []string{"untar"}, code: exit.Code, stderr: exit.Message}
		if strings.Contains(exit.Message, "no space left") {
			err = g.fullError(err)
		}
	}
	return err
}

func (g guest) hello(ctx context.Context) (wire.Hello, error) {
	ctx, cancel := context.WithTimeout(ctx, quickTime)
	defer cancel()
	var h wire.Hello
	conn, err := g.dial(ctx)
	if err == nil {
		err = wire.Call(ctx, conn, wire.Request{Op: wire.OpHello}, &h)
	}
	return h, err
}

// bounded is a buffer with a limit: it refuses more, or drops it.
type bounded struct {
	bytes.Buffer
	limit int
	drop  bool
}

func (b *bounded) Write(p []byte) (int, error) {
	if free := b.limit - b.Len(); len(p) > free {
		if !b.drop {
			return 0, api.Errorf(api.Refused, "the guest said more than %d MiB", b.limit>>20)
		}
		b.Buffer.Write(p[:free])
		return len(p), nil
	}
	return b.Buffer.Write(p)
}
