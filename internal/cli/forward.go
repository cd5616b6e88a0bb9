package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/guest/wire"
	"banger/internal/netwire"
	"banger/internal/shim"
)

func (a *app) forwardCommand() *cobra.Command {
	var detach bool
	cmd := &cobra.Command{
		Use:   "forward VM [LOCAL:]REMOTE",
		Short: "reach a service inside a VM",
		Long: `Forward gives the host an address that leads to a service in a running VM, whatever the
VM's network allows, and prints it. It goes on until Ctrl-C, or until the VM stops.

REMOTE is a port in the guest, of a service that may serve the guest itself only, or the
absolute path of a Unix socket there. LOCAL is PORT or ADDR:PORT on the host (default:
the same port on the loopback, which all users of the host reach; 0 takes a free one), or
a path that begins with "." or "/" for a Unix socket that only you reach.

With -d it goes on in the background, until the VM stops, also without a daemon.`,
		Example: `  banger forward shop 5432
  banger forward shop 3000:/run/app.sock
  banger forward -d shop ./db.sock:5432`,
		Args:        arguments(2, 2, "VM or REMOTE"),
		Annotations: exits(),
	}
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "go on in the background, and print the address once it is there")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		spec, err := parseForward(args[1])
		if err != nil {
			return usage(cmd, "%q: %s", args[1], err)
		}
		if spec.network == "unix" {
			if spec.local, err = filepath.Abs(spec.local); err != nil {
				return err
			}
		}
		f := &forward{app: a, ref: args[0], spec: spec}
		if detach {
			return f.background(cmd.Context())
		}
		started := func(readiness) {}
		if a.env.get(readyFD) != "" {
			started = readyPipe()
		}
		err = f.run(cmd.Context(), started)
		if err != nil {
			e := asError(err)
			started(readiness{Code: e.Code, Message: e.Message, Hint: e.Hint})
		}
		return err
	}
	return cmd
}

// forwardSpec is what a forward leads from and to.
type forwardSpec struct {
	network string    // "tcp" or "unix"
	local   string    // ADDRESS:PORT, or a path
	remote  string    // a port, or a path
	dial    wire.Dial // the same for the guest
}

func (s forwardSpec) String() string { return s.local + ":" + s.remote }

// maxSocketPath is the longest path of a Unix socket, see unix(7).
const maxSocketPath = 107

// parseForward reads [LOCAL:]REMOTE.
func parseForward(text string) (s forwardSpec, err error) {
	local := ""
	if cut := strings.LastIndex(text, ":/"); cut >= 0 {
		local, s.remote = text[:cut], text[cut+1:]
	} else if cut := strings.LastIndexByte(text, ':'); cut >= 0 {
		local, s.remote = text[:cut], text[cut+1:]
	} else {
		s.remote = text
	}
	if strings.HasPrefix(s.remote, "/") {
		s.dial = wire.Dial{Network: "unix", Address: s.remote}
		if local == "" {
			return s, errors.New("a socket needs a place on the host, as in 3000:/run/app.sock")
		}
	} else {
		port, err := strconv.ParseUint(s.remote, 10, 16)
		if err != nil || port == 0 {
			return s, fmt.Errorf("%q is neither a port in the guest nor an absolute path there", s.remote)
		}
		s.dial = wire.Dial{Network: "tcp", Address: "localhost:" + s.remote}
		if local == "" && s.remote == text {
			local = s.remote
		}
	}
	if strings.HasPrefix(local, ".") || strings.HasPrefix(local, "/") {
		s.network, s.local = "unix", local
		return s, nil
	}
	s.network = "tcp"
	if !strings.Contains(local, ":") {
		local = "127.0.0.1:" + local
	}
	at, err := netip.ParseAddrPort(local)
	if err != nil {
		return s, fmt.Errorf("%q is no port, ADDRESS:PORT or path on the host", strings.TrimPrefix(local, "127.0.0.1:"))
	}
	s.local = at.String()
	return s, nil
}

// forward is one address of the host that leads into a VM.
type forward struct {
	*app
	ref    string // of the VM, as it was typed
	spec   forwardSpec
	client *client
	vm     *bangerv1.VM
}

const (
	// maxConnections bounds how many connections one forward has at once; more wait.
	maxConnections = 128
	// watchInterval is how often a forward looks whether its VM still runs.
	watchInterval = 2 * time.Second
)

var errVMEnded = errors.New("the VM has ended")

// run forwards until ctx or the VM ends. started is told when the address is there.
func (f *forward) run(ctx context.Context, started func(readiness)) (err error) {
	listener, err := f.listen()
	if err != nil {
		return err
	}
	defer listener.Close()
	if f.client, err = f.connect(ctx); err != nil {
		return err
	}
	defer f.client.close()
	if f.vm, err = f.client.vms.Show(ctx, &bangerv1.ShowVMRequest{Ref: f.ref}); err != nil {
		return err
	}
	if f.vm.State != bangerv1.VM_RUNNING {
		return api.Errorf(api.Refused, "%s does not run: it is %s", f.vm.Name, strings.ToLower(f.vm.State.String())).
			WithHint("banger start %s", f.vm.Name)
	}
	address := listener.Addr().String()
	started(readiness{Ready: true, Address: address})
	if err := f.tell(f.vm.Name, address, 0); err != nil {
		return err
	}
	return f.serve(ctx, listener)
}

// tell prints where the forward is, and with a pid that it goes on there.
func (f *forward) tell(vm, address string, pid int) error {
	line := address + " → " + vm + ":" + f.spec.remote
	if pid != 0 {
		line += fmt.Sprintf("; ends with the VM, or: kill %d", pid)
	}
	f.ui.note("%s", cleanLine(line))
	if !f.json {
		_, err := fmt.Fprintln(f.stdout, address)
		return err
	}
	about := map[string]any{"address": address, "vm": vm, "remote": f.spec.remote}
	if pid != 0 {
		about["pid"] = pid
	}
	b, err := json.Marshal(about)
	if err != nil {
		return err
	}
	return f.printIndented(b)
}

// listen takes the local address.
func (f *forward) listen() (net.Listener, error) {
	network := f.spec.network
	if network == "unix" {
		if len(f.spec.local) > maxSocketPath {
			return nil, api.Errorf(api.Invalid, "cannot forward %s: the path of a socket has at most %d bytes", f.spec.local, maxSocketPath).
				WithHint("cd %s", shellWord(filepath.Dir(f.spec.local)))
		}
		// The socket is never open to others, not for a moment either.
		defer syscall.Umask(syscall.Umask(0o177))
	} else if network = "tcp6"; netip.MustParseAddrPort(f.spec.local).Addr().Is4() {
		network = "tcp4" // "tcp" would take both for 0.0.0.0
	}
	listener, err := net.Listen(network, f.spec.local)
	if err == nil {
		return listener, nil
	}
	free := fmt.Sprintf("banger forward %s 0:%s", shellWord(f.ref), shellWord(f.spec.remote))
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return nil, fmt.Errorf("cannot forward %s: %w", f.spec.local, err)
	}
	if network != "unix" {
		port := netwire.Publication{Protocol: "tcp", Host: netip.MustParseAddrPort(f.spec.local)}
		return nil, api.Errorf(portCode(errno), "cannot forward: %s", port.Refused(errno)).WithHint("%s", free)
	}
	switch errno {
	case syscall.EADDRINUSE:
		return nil, api.Errorf(api.Busy, "cannot forward %s: there is such a file already", f.spec.local).WithHint("ls -l %s", shellWord(f.spec.local))
	case syscall.ENOENT:
		return nil, api.Errorf(api.NotFound, "cannot forward %s: there is no such directory", f.spec.local)
	}
	return nil, fmt.Errorf("cannot forward %s: %w", f.spec.local, errno)
}

// portCode is the code of what the host says when it does not give a port.
func portCode(errno syscall.Errno) api.Code {
	switch errno {
	case syscall.EADDRINUSE:
		return api.Busy
	case syscall.EADDRNOTAVAIL:
		return api.Invalid
	}
	return api.Refused
}

// serve takes connections until ctx or the VM ends, and returns when all are closed.
func (f *forward) serve(ctx context.Context, listener net.Listener) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer context.AfterFunc(ctx, func() { listener.Close() })()
	var all sync.WaitGroup
	defer all.Wait()
	defer end(nil) // before the wait: it closes what is open
	all.Go(func() { f.watchVM(ctx, end) })
	places := make(chan struct{}, maxConnections)
	for {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			return f.ended(ctx)
		}
		conn, err := listener.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return f.ended(ctx)
		}
		if err != nil {
			// Descriptors that have run out come back; all else is for good.
			if !errors.Is(err, syscall.EMFILE) && !errors.Is(err, syscall.ENFILE) && !errors.Is(err, syscall.ECONNABORTED) {
				return fmt.Errorf("cannot take connections: %w", err)
			}
			<-places
			select {
			case <-time.After(pollInterval):
			case <-ctx.Done():
			}
			continue
		}
		all.Go(func() {
			defer func() { <-places }()
			f.pass(ctx, conn)
		})
	}
}

// ended says why a forward is over.
func (f *forward) ended(ctx context.Context) error {
	if errors.Is(context.Cause(ctx), errVMEnded) {
		f.ui.note("%s does not run any more", f.vm.Name)
		return nil
	}
	return errInterrupted
}

// watchVM ends a forward when its VM does not run any more. It starts no daemon: one
// that is stopped stays so, and what it knows of the VM is asked of the next.
func (f *forward) watchVM(ctx context.Context, end context.CancelCauseFunc) {
	c, err := openClient(f.client.layout, false)
	if err != nil {
		end(err)
		return
	}
	defer c.close()
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		vm, err := c.vms.Show(ctx, &bangerv1.ShowVMRequest{Ref: f.vm.Id})
		if codeOf(err) == api.NotFound || err == nil && vm.State != bangerv1.VM_RUNNING {
			end(errVMEnded)
			return
		}
		if isLost(err) { // nobody may ever come to say so: the VM's lock does
			if held, herr := shim.Held(f.client.layout.VM(f.vm.Id).Path()); herr == nil && !held {
				end(errVMEnded)
				return
			}
		}
	}
}

// background starts the same forward as a process of its own and tells where it is.
func (f *forward) background(ctx context.Context) error {
	c, err := f.connect(ctx)
	if err != nil {
		return err
	}
	defer c.close()
	vm, err := c.vms.Show(ctx, &bangerv1.ShowVMRequest{Ref: f.ref})
	if err != nil {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	pr, pw, err := os.Pipe()
	if err != nil {
		return err
	}
	defer pr.Close()
	self, err := os.Executable()
	if err != nil {
		pw.Close()
		return fmt.Errorf("cannot find banger itself: %w", err)
	}
	pid, err := f.detach(c, self, []string{"banger", "forward", "--", vm.Name, f.spec.String()}, []*os.File{null, null, null, pw})
	pw.Close()
	if err != nil {
		return fmt.Errorf("cannot start a forward in the background: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	r, err := readReadiness(ctx, pr)
	if err != nil {
		// It may be there all the same, and nobody would know.
		_ = syscall.Kill(pid, syscall.SIGTERM)
		if f.signals.interrupted() {
			return errInterrupted
		}
		return fmt.Errorf("cannot start a forward in the background: %w", err)
	}
	if err := r.err(); err != nil {
		return rehint(err, func(hint string) string {
			return strings.Replace(hint, "banger forward ", "banger forward -d ", 1)
		})
	}
	return f.tell(vm.Name, r.Address, pid)
}
