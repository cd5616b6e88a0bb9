package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"syscall"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
	"banger/internal/daemon"
)

// server is what daemon.Open returns.
type server interface {
	Serve(ctx context.Context) error
	Close() error
}

// runDaemon is the life of bangerd: it opens, tells whoever started it how that went,
// and serves until it is asked to end. VMs go on running.
func runDaemon(args []string, stdout, stderr io.Writer, open func(ctx context.Context, system bool) (server, error)) int {
	ready := readyPipe()
	system := slices.Equal(args, []string{"--system"})
	switch {
	case system:
	case len(args) == 1 && (args[0] == "--version" || args[0] == "version"):
		version, commit := buildVersion()
		fmt.Fprintln(stdout, "bangerd", version, commit)
		return exitOK
	case len(args) > 0:
		fmt.Fprintf(stderr, "bangerd: it takes no arguments but --system: %q\nhint: banger daemon status\n", args[0])
		return exitUsage
	}
	// What the daemon makes, root file systems among it, must not depend on whose shell
	// came first; the state directory itself is private.
	syscall.Umask(0o022)
	signal.Ignore(syscall.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	s, err := open(ctx, system)
	if err != nil {
		e := asError(err)
		ready(readiness{Code: e.Code, Message: e.Message, Hint: e.Hint})
		fmt.Fprintf(stderr, "bangerd: %s\n", clean(e.Message))
		if e.Hint != "" {
			fmt.Fprintf(stderr, "hint: %s\n", clean(e.Hint))
		}
		return exitCodeOf(err, false)
	}
	ready(readiness{Ready: true})
	err = s.Serve(ctx)
	if cerr := s.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		fmt.Fprintf(stderr, "bangerd: %s\n", clean(err.Error()))
	}
	return exitCodeOf(err, false)
}

// readyPipe finds the pipe of the banger that started this process and returns how to
// tell it, once. Without one nobody is told.
func readyPipe() func(readiness) {
	fd, err := strconv.Atoi(os.Getenv(readyFD))
	os.Unsetenv(readyFD)
	if err != nil || fd < 3 {
		return func(readiness) {}
	}
	syscall.CloseOnExec(fd)
	pipe := os.NewFile(uintptr(fd), "ready")
	return func(r readiness) {
		// Who started it may be gone: it does not matter then.
		_ = json.NewEncoder(pipe).Encode(r)
		_ = pipe.Close()
	}
}

// DaemonMain is what bangerd is. programs holds banger-shim, banger-guest and banger-net
// at its top.
func DaemonMain(args []string, stdout, stderr io.Writer, programs fs.FS, opts ...daemon.Option) int {
	return runDaemon(args, stdout, stderr, func(ctx context.Context, system bool) (server, error) {
		version, _ := buildVersion()
		build, err := buildOf("/proc/self/exe")
		if err != nil {
			return nil, err
		}
		opts := append([]daemon.Option{
			daemon.WithBuild(daemon.Build{Version: version, ID: build}), daemon.WithPrograms(programs),
		}, opts...)
		if system {
			opts = append(opts, daemon.WithSystem())
		}
		d, err := daemon.Open(ctx, opts...)
		if err != nil {
			return nil, err // not a *Daemon that is nil in an interface that is not
		}
		return d, nil
	})
}

// hostDoctor runs the checks of this machine without a daemon.
func hostDoctor(ctx context.Context, l config.Layout) []*bangerv1.Check {
	return daemon.Doctor(ctx, daemon.WithLayout(l))
}
