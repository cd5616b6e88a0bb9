package fcproc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/driver"
)

// The API is HTTP/1.1 over a Unix socket; a call that changes something answers 204, one
// that fails {"fault_message": "…"}. See docs/getting-started.md and the swagger file in
// Firecracker's source.

const (
	// bootTimeout is for a context without a deadline.
	bootTimeout = 2 * time.Minute
	// bootPoll is how often the socket is tried: a failed connect costs about 10 µs.
	bootPoll = 5 * time.Millisecond
	// callTimeout bounds one call when its context does not.
	callTimeout = 30 * time.Second
	// maxAnswer bounds an answer, in bytes. Firecracker is confined but not trusted: a
	// guest may have taken it over.
	maxAnswer = 1 << 20
)

// fault is a call that Firecracker refused.
type fault struct {
	Call    string
	Status  int
	Message string `json:"fault_message"`
}

func (e *fault) Error() string {
	return fmt.Sprintf("firecracker refused %s: %.300q (status %d)", e.Call, e.Message, e.Status)
}

// client makes calls to the API of the VM in dir.
func client(dir string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialJail(ctx, dir, apiSocket)
		},
	}}
}

func do(ctx context.Context, c *http.Client, k call) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	body, err := json.Marshal(k.Body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, k.Method, "http://firecracker"+k.Path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return err
	}
	if res.StatusCode/100 == 2 {
		return nil
	}
	f := &fault{Call: k.Method + " " + k.Path, Status: res.StatusCode}
	if json.Unmarshal(answer, f) != nil || f.Message == "" {
		f.Message = string(answer)
	}
	return f
}

// Boot waits for the API's socket and makes the calls. When Firecracker ends first Boot
// does not see it: the caller must end ctx.
func (v *VMM) Boot(ctx context.Context, dir string, spec driver.Spec) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, bootTimeout)
		defer cancel()
	}
	c := client(dir)
	if err := awaitAPI(ctx, dir); err != nil {
		return fmt.Errorf("cannot boot: %w", err)
	}
	for _, k := range calls(spec) {
		if err := do(ctx, c, k); err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return fmt.Errorf("cannot boot: %w", err)
		}
	}
	return nil
}

// awaitAPI returns when somebody listens.
func awaitAPI(ctx context.Context, dir string) error {
	tick := time.NewTicker(bootPoll)
	defer tick.Stop()
	for {
		conn, err := dialJail(ctx, dir, apiSocket)
		if err == nil {
			return conn.Close()
		}
		if ctx.Err() == nil && !notYet(err) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%w (%v)", context.Cause(ctx), err)
		}
	}
}

// notYet tells a process that has not come so far.
func notYet(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED)
}

// Ending says what an exit code means, see FcExitCode in src/vmm/src/lib.rs of
// Firecracker's source. The jailer, which has it before, fails by a panic, SIGABRT, and
// says why on its standard error.
func (v *VMM) Ending(code int) string {
	return map[int]string{
		0:   "the guest's kernel reset the machine, as after a panic",
		1:   "firecracker failed",
		2:   "firecracker met what it did not expect",
		148: "firecracker made a system call that its filter forbids",
		149: "firecracker lost memory under it (SIGBUS)",
		150: "firecracker crashed (SIGSEGV)",
		151: "a file was to become larger than allowed (SIGXFSZ)",
		152: "firecracker refused its configuration",
		153: "firecracker does not know an argument: it is of another version",
		154: "firecracker used up its processor time (SIGXCPU)",
		155: "firecracker lost what it writes to (SIGPIPE)",
		156: "firecracker lost its session (SIGHUP)",
		157: "firecracker met an instruction that this CPU lacks (SIGILL)",
	}[code]
}

// PowerButton presses Ctrl-Alt-Del, which is all that Firecracker has. What comes of it is
// the guest's affair.
func (v *VMM) PowerButton(ctx context.Context, dir string) error {
	err := do(ctx, client(dir), call{"PUT", "/actions", action{"SendCtrlAltDel"}})
	if err != nil {
		return fmt.Errorf("cannot press the guest's keys: %w", err)
	}
	return nil
}
