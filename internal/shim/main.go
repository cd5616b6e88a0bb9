package shim

import (
	"encoding/json"
	"errors"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The descriptors that a shim is born with, after the three standard ones.
const (
	lockFD   = 3
	reportFD = 4
	placedFD = 5 // only of a VM with a group
)

// drainGrace is how long the shim waits for the end of all output after the VMM has
// ended; only a descendant of it can hold the pipes open.
const drainGrace = 2 * time.Second

// Main is the program banger-shim, and returns its exit code. It must be called
// from main.main of a process that Launch started, its goroutine locked to the
// first thread.
func Main() int {
	runtime.LockOSThread()
	signals := make(chan os.Signal, 16)
	// Caught rather than ignored: a handler does not pass exec, so the VMM starts
	// with the defaults.
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT,
		syscall.SIGPIPE, syscall.SIGALRM, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGXFSZ,
		syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU)
	if err := checkLock(); err != nil {
		_, _ = os.Stderr.WriteString("banger-shim: " + err.Error() + "\n")
		return 2
	}
	syscall.Umask(0o077)
	// A core file would hold the guest's memory.
	_ = syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{})
	s := &supervisor{drained: make(chan struct{}, 3)}
	cfg, err := readConfig()
	if err == nil {
		err = ownDescriptors(cfg.Group != "")
	}
	if err == nil && cfg.Group != "" {
		err = awaitPlaced()
	}
	if err == nil {
		err = s.start(cfg)
	}
	if err != nil {
		s.record(Exit{How: StartFailed, Error: err.Error()})
		report("error " + strconv.Itoa(int(errnoOf(err))) + " " + err.Error())
		return 1
	}
	report("ok")
	go s.forward(signals)
	s.record(s.wait())
	return 0
}

// report tells the daemon, if there is one, how the start went.
func report(line string) {
	line = strings.ReplaceAll(line, "\n", " ") + "\n"
	_, _ = syscall.Write(reportFD, []byte(line))
	_ = syscall.Close(reportFD)
}

// ownDescriptors keeps what Launch gave and closes what a careless ancestor left
// open: a forgotten pipe would make somebody wait for the VM's end. What the Go
// runtime opened has close-on-exec set; what came through exec has not.
func ownDescriptors(placed bool) error {
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, entry := range dir {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil || fd <= 2 {
			continue
		}
		flags, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETFD, 0)
		if errno != 0 || flags&syscall.FD_CLOEXEC != 0 {
			continue
		}
		if fd == lockFD || fd == reportFD || fd == placedFD && placed {
			syscall.CloseOnExec(fd)
			continue
		}
		_ = syscall.Close(fd)
	}
	return nil
}

// awaitPlaced waits until the daemon has put the shim into its group: what is forked
// before is elsewhere.
func awaitPlaced() error {
	defer syscall.Close(placedFD)
	for {
		n, err := syscall.Read(placedFD, make([]byte, 1))
		if err == syscall.EINTR {
			continue
		}
		if err == nil && n == 0 {
			err = errors.New("bangerd ended before the VM had its group")
		}
		return err
	}
}

// checkLock makes sure that descriptor 3 holds the lock. To lock again what the
// same description holds already changes nothing.
func checkLock() error {
	var given, there syscall.Stat_t
	if syscall.Fstat(lockFD, &given) != nil || syscall.Stat(lockFile, &there) != nil ||
		given.Dev != there.Dev || given.Ino != there.Ino {
		return errors.New("only bangerd starts this program")
	}
	lock := wholeFile(syscall.F_WRLCK)
	if err := fcntlLock(lockFD, ofdSetLock, &lock); err != nil {
		return errors.New("another process supervises this VM")
	}
	return nil
}

// supervisor is one VMM, its output, and its network.
type supervisor struct {
	console *console
	stderr  *stderrLog
	open    int // streams that are drained
	drained chan struct{}
	group   string

	children children
	vmm      child
	net      *network // nil without one
	who      Supervised
}

func readConfig() (cfg Config, err error) {
	data, err := os.ReadFile(configFile)
	if err != nil {
		return cfg, err
	}
	if err := json.Unmarshal(data, &cfg); err != nil || len(cfg.Argv) == 0 {
		return cfg, errors.New("cannot understand " + configFile)
	}
	return cfg, nil
}

func (s *supervisor) start(cfg Config) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	pid, err := ownPID()
	if err != nil {
		return err
	}
	self, err := identify(pid)
	if err != nil {
		return err
	}
	s.children.namespaced = cfg.Group != ""
	s.group = cfg.Group
	s.console = newConsole(consoleLimit)
	s.stderr = newStderrLog(stderrFile)
	s.who = Supervised{Version: fileVersion, BootID: boot, Shim: self}
	if err := writeJSON(processesFile, s.who, false); err != nil {
		return err
	}
	if cfg.Network != nil {
		if err := s.openNetwork(*cfg.Network); err != nil {
			return err
		}
	}
	return s.startAll(cfg)
}

// startAll leaves nothing running when it fails.
func (s *supervisor) startAll(cfg Config) (err error) {
	defer func() {
		if err != nil {
			s.net.stop()
		}
	}()
	if s.net != nil {
		if err := s.net.start(); err != nil {
			return err
		}
		s.who.Net = s.net.child.process
	}
	if err := s.fork(cfg); err != nil {
		return err
	}
	s.who.VMM = s.vmm.process
	if err = writeJSON(processesFile, s.who, false); err != nil {
		s.children.signal(s.vmm, syscall.SIGKILL)
		s.wait()
	}
	return err
}

// fork starts the VMM with /dev/null as standard input, its output drained, and
// the lock as descriptor 3. In a group of its own it has no lock: a jailer would close it,
// and the group tells more.
func (s *supervisor) fork(cfg Config) error {
	program, err := lookPath(cfg.Argv[0], cfg.Env)
	if err != nil {
		return cannotStart(cfg.Argv[0], err)
	}
	var out, errs [2]int
	if err := syscall.Pipe2(out[:], syscall.O_CLOEXEC); err != nil {
		return err
	}
	if err := syscall.Pipe2(errs[:], syscall.O_CLOEXEC); err != nil {
		return err
	}
	attr := &syscall.ProcAttr{
		Env:   cfg.Env,
		Files: []uintptr{0, uintptr(out[1]), uintptr(errs[1])},
		Sys:   &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	}
	if cfg.Group == "" {
		attr.Files = append(attr.Files, lockFD)
	} else {
		group, err := syscall.Open(cfg.Group, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
		if err != nil {
			return cannotStart(cfg.Argv[0], &os.PathError{Op: "open", Path: cfg.Group, Err: err})
		}
		defer syscall.Close(group)
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, group
	}
	s.vmm, err = s.children.start(program, cfg.Argv, attr)
	_ = syscall.Close(out[1])
	_ = syscall.Close(errs[1])
	if err != nil {
		return cannotStart(cfg.Argv[0], err)
	}
	s.drain(out[0], s.console, 8<<10)
	s.drain(errs[0], s.stderr, 4<<10)
	return nil
}

func cannotStart(program string, err error) error {
	return &StartError{Text: "cannot start " + program + ": " + err.Error(), Errno: errnoOf(err)}
}

// drain begins to drain fd.
func (s *supervisor) drain(fd int, into sink, size int) {
	s.open++
	go func() { drain(fd, into, make([]byte, size)); s.drained <- struct{}{} }()
}

// forward passes SIGTERM on and swallows the rest.
func (s *supervisor) forward(signals <-chan os.Signal) {
	for sig := range signals {
		if sig != syscall.SIGTERM {
			continue
		}
		s.children.signal(s.vmm, syscall.SIGTERM)
	}
}

// wait waits for the VMM and the end of its output, and says how it ended. Until then
// it keeps the network, which ends with it.
func (s *supervisor) wait() Exit {
	status := s.keep()
	s.net.stop()
	grace := time.NewTimer(drainGrace)
	for ; s.open > 0; s.open-- {
		select {
		case <-s.drained:
		case <-grace.C:
			s.open = 0
		}
	}
	if status.Signaled() {
		oom := s.group != "" && status.Signal() == syscall.SIGKILL && outOfMemory(s.group)
		return Exit{How: Signaled, Signal: signalName(status.Signal()), OutOfMemory: oom}
	}
	return Exit{How: Exited, Code: status.ExitStatus()}
}

// record writes exit.json. Whether it can or not, the shim's work is done: a VM's
// directory that is gone, or a full disk, is no reason to stay.
func (s *supervisor) record(e Exit) {
	e.Version = fileVersion
	e.At = time.Now().UTC()
	if s.console != nil {
		e.Console, e.Intent = lastLines(s.console.last())
	}
	if s.stderr != nil {
		e.Stderr = s.stderr.finish()
	}
	if s.net != nil {
		s.net.stderr.finish()
	}
	_ = writeJSON(exitFile, e, true)
}

// lookPath finds the VMM as Config.Argv says.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, kv := range env {
		if value, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = value
		}
	}
	for _, dir := range strings.Split(path, ":") {
		const execute = 1 // X_OK of access(2)
		if strings.HasPrefix(dir, "/") && syscall.Access(dir+"/"+name, execute) == nil {
			return dir + "/" + name, nil
		}
	}
	return "", syscall.ENOENT
}

func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return 0
}

// signalName is "KILL" and its like for signals that end VMMs, else a number.
func signalName(sig syscall.Signal) string {
	switch sig {
	case syscall.SIGKILL:
		return "KILL"
	case syscall.SIGTERM:
		return "TERM"
	case syscall.SIGINT:
		return "INT"
	case syscall.SIGHUP:
		return "HUP"
	case syscall.SIGQUIT:
		return "QUIT"
	case syscall.SIGABRT:
		return "ABRT"
	case syscall.SIGSEGV:
		return "SEGV"
	case syscall.SIGBUS:
		return "BUS"
	case syscall.SIGILL:
		return "ILL"
	case syscall.SIGFPE:
		return "FPE"
	case syscall.SIGPIPE:
		return "PIPE"
	case syscall.SIGSYS:
		return "SYS"
	case syscall.SIGXCPU:
		return "XCPU"
	case syscall.SIGXFSZ:
		return "XFSZ"
	}
	return strconv.Itoa(int(sig))
}
