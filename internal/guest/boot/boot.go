// Package boot is what banger-guest does as the first process of a guest. It runs
// from the initramfs, takes the guest to the point where the image's own userland
// could begin, starts the agent there, and then becomes the image's init or stays
// to reap. It starts no other program of the image, needs none, and learns
// everything from wire.Config.
//
//	initramfs  mount sys, dev → read the configuration → load modules → find and
//	           mount the root disk → grow its file system → switch root
//	image      mount proc, sys, dev, run → clock, network, names, user, kernel modules →
//	           start the agent → exec systemd, or stay PID 1
//	the end    as systemd's /run/initramfs/shutdown, or after the agent's word:
//	           unmount → write the intent to the console → restart the machine
//
// The order is the rule of use: root is switched before anything of the image is
// touched, so that its symbolic links mean what they mean inside; and the agent is
// started after that and before the hand-over, so that it has the image's root, is
// ready with the kernel, and outlives every userland.
//
// A step that leaves the guest unusable ends the boot with one line on the
// console and the intent "failed"; one that leaves it usable (a full disk keeps
// /etc/hosts from being written) is a warning. Nothing waits without a deadline.
package boot

import (
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

// Serve is the agent: it serves the port until the port breaks, or returns why it
// cannot. cfg.User is the account that the user became by the rule of this
// package.
type Serve func(cfg wire.Config, system *System, port string) error

// Main is the whole of banger-guest but for the agent, which is handed in. args
// are the program's arguments: they and the process id tell in which of its parts
// it runs. It returns the exit code, if it returns.
func Main(args []string, serve Serve) int {
	switch {
	case len(args) > 0 && args[0] == agentName:
		return agentMain(serve)
	case os.Getpid() != 1:
		fmt.Fprintln(os.Stderr, "banger-guest runs inside a guest, as its first process")
		return 2
	case len(args) > 0 && filepath.Base(args[0]) == filepath.Base(shutdownProgram):
		takeSignals()
		shutdownMain(args)
	default:
		initMain()
	}
	return 1
}

// guest is the state of the first process.
type guest struct {
	cfg     wire.Config
	signals signals
	uevents *uevents
	root    string // device of the root disk
	port    string // device of the agent's port
	init    string // program of the image that becomes PID 1, empty for none
	agent   int    // process id
}

func initMain() {
	g := &guest{signals: takeSignals()}
	err := g.run()
	fail(err)
}

// signals is what PID 1 is sent. child holds at most one: it says "look", not how
// many.
type signals struct{ child, other chan os.Signal }

// takeSignals catches what anybody may send: the Go runtime would exit on some of
// it, and the exit of PID 1 is a panic of the kernel.
func takeSignals() signals {
	s := signals{child: make(chan os.Signal, 1), other: make(chan os.Signal, 16)}
	signal.Notify(s.child, syscall.SIGCHLD)
	for sig := syscall.Signal(1); sig <= 64; sig++ {
		switch sig {
		case syscall.SIGCHLD, syscall.SIGKILL, syscall.SIGSTOP:
		case syscall.SIGURG, syscall.SIGPROF, syscall.SIGPIPE: // the runtime's own
		case syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGILL: // faults
		default:
			signal.Notify(s.other, sig)
		}
	}
	return s
}

// run returns only when the boot has failed.
func (g *guest) run() (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("cannot boot: %v", p)
		}
	}()
	unix.Umask(0o022)
	fatal := []func() error{
		mountInitramfs,
		g.openUevents,
		g.readConfig,
		g.loadModules,
		g.mountRoot,
		g.growRoot,
		switchRoot,
		mountSystem,
	}
	for _, step := range fatal {
		if err := step(); err != nil {
			return err
		}
	}
	usable := []func() error{
		catchKeys,
		g.setClock,
		loopbackUp,
		g.networkUp,
		g.setNames,
		g.setResolver,
		g.makeUser,
	}
	for _, step := range usable {
		if err := step(); err != nil {
			warn(err)
		}
	}
	if g.init = findInit(); g.init != "" {
		if err := keysPowerOff(); err != nil {
			warn(err)
		}
	}
	fatal = []func() error{
		g.mountKernelModules,
		g.findPort,
		g.startAgent,
	}
	if g.init == "" {
		fatal = append(fatal, mountWithoutInit, g.stay)
	} else {
		fatal = append(fatal, prepareShutdown, maskGetty, g.handOver)
	}
	for _, step := range fatal {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (g *guest) readConfig() error {
	data, err := os.ReadFile(wire.ConfigPath)
	if err != nil {
		return fmt.Errorf("cannot read the configuration of this boot: %w", err)
	}
	if err := json.Unmarshal(data, &g.cfg); err != nil {
		return fmt.Errorf("cannot read the configuration of this boot: %w", err)
	}
	if g.cfg.Version != 1 {
		return fmt.Errorf("cannot read the configuration of this boot: version %d is unknown", g.cfg.Version)
	}
	if len(g.cfg.Magic) != wire.MagicLen {
		return fmt.Errorf("cannot read the configuration of this boot: a magic of %d bytes", len(g.cfg.Magic))
	}
	return nil
}

// findInit says which program of the image becomes PID 1. Only systemd does: an
// image made for containers often holds a /sbin/init (busybox, tini) that finds
// none of what it expects, and without systemd banger-guest starts nothing and
// reaps.
func findInit() string {
	const program = "/sbin/init"
	target, err := filepath.EvalSymlinks(program)
	if err != nil || filepath.Base(target) != "systemd" {
		return ""
	}
	if unix.Access(target, unix.X_OK) != nil {
		return ""
	}
	return program
}

func (g *guest) handOver() error {
	note("handing over to %s", g.init)
	err := syscall.Exec(g.init, []string{g.init}, []string{"HOME=/", "TERM=linux", "PATH=" + path})
	return fmt.Errorf("cannot start %s: %w", g.init, err)
}

const path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
