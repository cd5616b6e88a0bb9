package hostcmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// strayGrace is how long a pipe may be silent after the command has ended, before
// it is taken to be held open by a process that left the group. What the command
// itself wrote lies in the pipe and is read without waiting, however slow the
// reader is.
const strayGrace = time.Second

// output is the reading end of one of the command's streams.
type output struct {
	file  *os.File
	ended atomic.Bool
}

func (o *output) Read(p []byte) (int, error) {
	if o.ended.Load() {
		_ = o.file.SetReadDeadline(time.Now().Add(strayGrace))
	}
	n, err := o.file.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = io.EOF
	}
	return n, err
}

func (o *output) Close() error { return o.file.Close() }

// end says that the command has ended.
func (o *output) end() {
	o.ended.Store(true)
	_ = o.file.SetReadDeadline(time.Now().Add(strayGrace))
}

// drain copies an output to a writer.
type drain struct {
	from *output
	to   io.Writer
	done chan struct{}
	err  error // set before done is closed
}

func newDrain(from *os.File, to io.Writer) *drain {
	return &drain{from: &output{file: from}, to: to, done: make(chan struct{})}
}

func (d *drain) run(fail context.CancelCauseFunc) {
	defer close(d.done)
	defer d.from.Close()
	// Hidden methods, or io.Copy would let the writer read as it likes.
	_, err := io.Copy(struct{ io.Writer }{d.to}, struct{ io.Reader }{d.from})
	if err != nil {
		d.err = fmt.Errorf("cannot pass on its output: %w", err)
		fail(d.err)
	}
}

func (d *drain) wait(ctx context.Context) error {
	select {
	case <-d.done:
		return d.err
	case <-ctx.Done():
	}
	timer := time.NewTimer(KillAfter)
	defer timer.Stop()
	select {
	case <-d.done:
		return d.err
	case <-timer.C:
		return ctx.Err()
	}
}

// feeder copies a reader to the command's standard input.
type feeder struct {
	from io.Reader
	to   *os.File
	done chan struct{}
	err  error // set before done is closed
}

func (f *feeder) run(fail context.CancelCauseFunc) {
	defer close(f.done)
	_, err := io.Copy(struct{ io.Writer }{f.to}, struct{ io.Reader }{f.from})
	// A command need not read all its input.
	if err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, os.ErrClosed) {
		f.err = fmt.Errorf("cannot pass on its input: %w", err)
		fail(f.err)
		// The pipe stays open until the command is dead, or it would take the part for
		// the whole.
		return
	}
	f.to.Close()
}

// wait does not wait for a Read of the source that is under way: nothing can end it.
func (f *feeder) wait() error {
	f.to.Close()
	timer := time.NewTimer(strayGrace)
	defer timer.Stop()
	select {
	case <-f.done:
		return f.err
	case <-timer.C:
		return nil
	}
}
