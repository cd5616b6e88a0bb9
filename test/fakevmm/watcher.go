package main

import (
	"io"
	"os"
	"os/exec"
	"syscall"
)

// watcherName is argv[0] of the process that outlives a killed fakevmm, to end the
// processes of its guest.
const watcherName = "fakevmm-watcher"

// startWatcher starts it. It learns of this process's end by its stdin, the other end
// of which is returned: it must stay open.
func startWatcher(mark string) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{watcherName, mark}, Dir: "/", Env: []string{},
		Stdin: r, SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := cmd.Start(); err != nil {
		w.Close()
		return nil, err
	}
	go cmd.Wait()
	return w, nil
}

func watch(mark string) {
	io.Copy(io.Discard, os.Stdin)
	killGuest(mark)
}
