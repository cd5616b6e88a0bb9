package agent

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

const (
	// lingerTime is how long after a command's end its output may stay open: who
	// still holds it then is a background process, and what the command wrote is
	// through.
	lingerTime = 2 * time.Second
	// hangupGrace is the time between SIGHUP and SIGKILL when the stream broke.
	hangupGrace = 5 * time.Second
	// maxMessage bounds the stderr that becomes the message of an exit, in bytes.
	maxMessage = 4 << 10
)

// process is a running command and its stream.
type process struct {
	s      *wire.Stream
	io     *stdio
	cmd    *exec.Cmd
	acks   bool
	finish bool // no SIGHUP
	stdin  *stdinQueue
	broken chan struct{} // closed when the host is gone

	mu    sync.Mutex
	ended bool // the pid, and so the process group's id, may belong to others
}

// run runs c to its end. The error is why it was not begun.
//
// All output that was written when the command ended, or within lingerTime after,
// is delivered before the exit, however slow the host; a background process that
// keeps the output open longer loses it. When the stream breaks first, the process
// group gets SIGHUP, and SIGKILL if the command is still there after hangupGrace;
// what the command writes then is dropped, so that its clean-up is not ended by
// SIGPIPE.
func run(s *wire.Stream, c command) error {
	x, err := openStdio(c)
	if err != nil {
		return err
	}
	defer x.close()
	cmd, err := start(c, x)
	x.closeChild()
	if err != nil {
		return err
	}
	p := &process{s: s, io: x, cmd: cmd, acks: c.acks, finish: c.finish, stdin: newStdinQueue(c.acks), broken: make(chan struct{})}
	defer p.stdin.close()
	s.SendJSON(wire.KindStarted, wire.Started{PID: cmd.Process.Pid})

	go p.control()
	go p.writeStdin()
	message := new(bounded)
	var outputs sync.WaitGroup
	outputs.Go(func() { p.copyOut(x.out, p.frames(wire.KindStdout)) })
	switch {
	case x.err == nil:
	case c.silent:
		outputs.Go(func() { p.copyOut(x.err, message) })
	default:
		outputs.Go(func() { p.copyOut(x.err, p.frames(wire.KindStderr)) })
	}

	exited := make(chan struct{})
	go func() {
		p.wait()
		close(exited)
	}()
	select {
	case <-exited:
	case <-p.broken:
		p.hangUp(exited)
	}
	deadline := time.Now().Add(lingerTime)
	x.out.SetReadDeadline(deadline)
	if x.err != nil {
		x.err.SetReadDeadline(deadline)
	}
	outputs.Wait()

	exit := exitOf(cmd.ProcessState)
	if exit.Code != 0 {
		exit.Message = strings.TrimSpace(message.String())
	}
	s.SendJSON(wire.KindExit, exit)
	s.Close()
	return nil
}

// wait waits for the command. Its pid stays taken until ended is set.
func (p *process) wait() {
	for {
		err := unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err != unix.EINTR {
			break
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
	p.cmd.Wait()
}

// signal signals the command's process group, while the command lives.
func (p *process) signal(sig syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.ended {
		syscall.Kill(-p.cmd.Process.Pid, sig)
	}
}

// hangUp ends the command as a terminal's hangup does, in the end by force.
func (p *process) hangUp(exited <-chan struct{}) {
	if !p.finish {
		p.signal(unix.SIGHUP)
	}
	p.signal(unix.SIGCONT) // a stopped one could not end
	if p.io.terminal {
		p.io.out.Close() // reaches the other process groups of the terminal
	}
	timer := time.NewTimer(hangupGrace)
	defer timer.Stop()
	select {
	case <-exited:
		return
	case <-timer.C:
	}
	p.signal(unix.SIGKILL)
	<-exited
}

// control takes the host's frames. With acknowledgements it never blocks on anything
// but the host, so that a signal and the end of the stream are always seen.
func (p *process) control() {
	defer func() {
		p.s.Close()
		close(p.broken)
	}()
	for {
		kind, payload, err := p.s.Recv()
		if err != nil {
			return
		}
		switch kind {
		case wire.KindStdin:
			if !p.stdin.put(payload) {
				return
			}
		case wire.KindStdinEOF:
			p.stdin.end()
		case wire.KindResize:
			var r wire.Resize
			if json.Unmarshal(payload, &r) != nil {
				return
			}
			p.io.resize(r)
		case wire.KindSignal:
			var r wire.Signal
			if json.Unmarshal(payload, &r) != nil {
				return
			}
			if sig := unix.SignalNum("SIG" + strings.TrimPrefix(r.Name, "SIG")); sig != 0 {
				p.signal(sig)
			}
		default:
			return
		}
	}
}

// endOfFile is ctrl-d, which a terminal takes for the end of its input. In the midst
// of a line it only ends the line.
const endOfFile = 4

// writeStdin gives the command its input. What it does not want is dropped.
func (p *process) writeStdin() {
	in := p.io.in
	midLine := false
	for {
		data, err := p.stdin.get()
		if err == io.EOF && in != nil {
			if p.io.terminal {
				if midLine {
					in.Write([]byte{endOfFile})
				}
				in.Write([]byte{endOfFile})
			} else {
				in.Close()
			}
		}
		if err != nil {
			return
		}
		midLine = data[len(data)-1] != '\n'
		if in != nil {
			if _, err := in.Write(data); err != nil {
				in = nil
			}
		}
		if p.acks && ack(p.s, len(data)) != nil {
			return
		}
	}
}

// frames is a writer that sends frames. After the stream broke it drops them.
func (p *process) frames(kind wire.Kind) io.Writer {
	return writerFunc(func(b []byte) { p.s.Send(kind, b) })
}

type writerFunc func(b []byte)

func (f writerFunc) Write(b []byte) (int, error) {
	f(b)
	return len(b), nil
}

// copyOut copies output to its end, or to the deadline that is set when the command
// has ended; what is in the pipe then is still delivered.
func (p *process) copyOut(r *os.File, w io.Writer) {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			w.Write(buf[:n])
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return
		}
	}
	for left := pending(r); left > 0; {
		r.SetReadDeadline(time.Now().Add(lingerTime)) // in case the kernel's number is wrong
		n, err := r.Read(buf[:min(left, len(buf))])
		if n > 0 {
			w.Write(buf[:n])
		}
		if err != nil {
			return
		}
		left -= n
	}
}

// pending is the number of bytes that can be read from r.
func pending(r *os.File) int {
	raw, err := r.SyscallConn()
	if err != nil {
		return 0
	}
	n := 0
	raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	return n
}

// bounded keeps the beginning of what is written to it.
type bounded struct{ strings.Builder }

func (b *bounded) Write(p []byte) (int, error) {
	b.Builder.Write(p[:min(len(p), maxMessage-b.Len())])
	return len(p), nil
}

// stdinQueue holds input that the command has not taken yet, at most
// wire.StdinWindow bytes.
type stdinQueue struct {
	strict bool // more than that is an error, else put waits

	mu     sync.Mutex
	change sync.Cond
	chunks [][]byte
	size   int // of chunks, in bytes
	eof    bool
	closed bool
}

func newStdinQueue(strict bool) *stdinQueue {
	q := &stdinQueue{strict: strict}
	q.change.L = &q.mu
	return q
}

// put appends a copy of p. It reports false when input is out of place or not wanted
// any more.
func (q *stdinQueue) put(p []byte) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.strict && !q.closed && q.size+len(p) > wire.StdinWindow {
		q.change.Wait()
	}
	if q.eof || q.closed || q.size+len(p) > wire.StdinWindow {
		return false
	}
	if len(p) > 0 {
		q.size += len(p)
		q.chunks = append(q.chunks, append([]byte(nil), p...))
		q.change.Broadcast()
	}
	return true
}

func (q *stdinQueue) end() {
	q.mu.Lock()
	q.eof = true
	q.mu.Unlock()
	q.change.Broadcast()
}

func (q *stdinQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.change.Broadcast()
}

var errQueueClosed = errors.New("the command has ended")

// get waits for the next input. The caller is done with the one before.
func (q *stdinQueue) get() ([]byte, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.chunks) == 0 && !q.eof && !q.closed {
		q.change.Wait()
	}
	switch {
	case q.closed:
		return nil, errQueueClosed
	case len(q.chunks) == 0:
		return nil, io.EOF
	}
	chunk := q.chunks[0]
	q.chunks = q.chunks[1:]
	q.size -= len(chunk)
	q.change.Broadcast()
	return chunk, nil
}
