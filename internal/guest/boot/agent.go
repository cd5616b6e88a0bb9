package boot

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"syscall"

	"banger/internal/guest/wire"
)

// agentName is the agent's argv[0]: systemd's shutdown spares processes of root
// whose name begins with '@', see its ROOT_STORAGE_DAEMONS document.
const agentName = "@banger-agent"

// maxOpenFiles is the hard limit for what the agent starts, systemd's own default.
const maxOpenFiles = 524288

// agentOrder is what init tells the agent, through a pipe.
type agentOrder struct {
	Config wire.Config
	Port   string
	Init   bool
}

// startAgent starts this program again as the agent, in a session of its own. The
// program's file is gone with the initramfs; the kernel still finds it.
func (g *guest) startAgent() error {
	data, err := json.Marshal(agentOrder{Config: g.cfg, Port: g.port, Init: g.init != ""})
	if err != nil {
		return fmt.Errorf("cannot start the agent: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("cannot start the agent: %w", err)
	}
	defer r.Close()
	defer w.Close()
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("cannot start the agent: %w", err)
	}
	defer null.Close()
	stderr, err := os.OpenFile("/dev/console", os.O_WRONLY|syscall.O_NOCTTY, 0)
	if err != nil {
		stderr = null
	} else {
		defer stderr.Close()
	}
	g.agent, err = syscall.ForkExec("/proc/self/exe", []string{agentName}, &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=" + path},
		Files: []uintptr{null.Fd(), null.Fd(), stderr.Fd(), r.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("cannot start the agent: %w", err)
	}
	r.Close() // so that an agent that died is an error here, not a wait
	if _, err := w.Write(data); err != nil {
		return fmt.Errorf("cannot start the agent: %w", err)
	}
	note("started the agent")
	return nil
}

func agentMain(serve Serve) int {
	err := runAgent(serve)
	fmt.Fprintf(os.Stderr, "banger: the agent ended: %v\r\n", err)
	return 1
}

func runAgent(serve Serve) error {
	pipe := os.NewFile(3, "order")
	data, err := io.ReadAll(io.LimitReader(pipe, 1<<20))
	pipe.Close()
	if err != nil {
		return err
	}
	var order agentOrder
	if err := json.Unmarshal(data, &order); err != nil {
		return fmt.Errorf("cannot read its configuration: %w", err)
	}
	// Neither is needed to serve: a name in ps, and room for what is started.
	_ = os.WriteFile("/proc/self/comm", []byte(agentName[1:]), 0)
	_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 1024, Max: maxOpenFiles})
	return serve(order.Config, &System{init: order.Init}, order.Port)
}
