package vm

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// dump shows what a failed test left to look at.
func (h *host) dump() {
	for _, pattern := range []string{"bangerd.log", "vms/*/log/*", "vms/*/run/*.json"} {
		paths, _ := filepath.Glob(filepath.Join(h.dir, pattern))
		for _, path := range paths {
			data, _ := os.ReadFile(path)
			if len(data) > 4000 {
				data = data[len(data)-4000:]
			}
			h.t.Logf("%s:\n%s", path, data)
		}
	}
	sockets, _ := filepath.Glob(filepath.Join(h.dir, "vms/*/run/qmp.sock"))
	for _, path := range sockets {
		state, err := guestState(path)
		h.t.Logf("%s: %v\n%s", path, err, state)
	}
}

// guestState is where the CPUs of a guest are, three times, and the stacks of the kernel
// there: a guest that hangs says no more itself. The guest goes on.
func guestState(socket string) (string, error) {
	conn, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	in, out := json.NewDecoder(conn), json.NewEncoder(conn)
	var message map[string]any
	if err := in.Decode(&message); err != nil { // the greeting
		return "", err
	}
	ask := func(command string, arguments map[string]any) (string, error) {
		if err := out.Encode(map[string]any{"execute": command, "arguments": arguments}); err != nil {
			return "", err
		}
		for { // events may come before the answer
			var message map[string]any
			if err := in.Decode(&message); err != nil {
				return "", err
			}
			if _, is := message["event"]; !is {
				return fmt.Sprint(message["return"], message["error"]), nil
			}
		}
	}
	if _, err := ask("qmp_capabilities", map[string]any{}); err != nil {
		return "", err
	}
	var text strings.Builder
	monitor := func(line string, cpu int) error {
		said, err := ask("human-monitor-command", map[string]any{"command-line": line, "cpu-index": cpu})
		fmt.Fprintf(&text, "CPU %d, %s:\n%s\n", cpu, line, said)
		return err
	}
	for range 3 {
		for cpu := range 2 {
			for _, line := range []string{"info registers", "x/48gx $rsp"} {
				if err := monitor(line, cpu); err != nil {
					return text.String(), err
				}
			}
		}
	}
	return text.String(), nil
}
