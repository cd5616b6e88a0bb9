// Command fakenet is banger-net without a network: it opens the published ports, answers
// on the control socket, and says in run/net.inforce what is in force. Nobody who connects
// to a port of it gets an answer.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"

	"banger/internal/netwire"
)

// inForce is where the network that is in force stands, relative to the VM's directory.
const inForce = "run/net.inforce"

type network struct {
	ports   map[string]io.Closer // by publication
	problem string
	busy    []string
}

func main() {
	n := &network{ports: make(map[string]io.Closer)}
	fmt.Fprintln(os.Stderr, "fakenet:", n.run())
	os.Exit(1)
}

// run returns only with an error.
func (n *network) run() error {
	if r := n.reload(); r.Error != "" {
		n.problem, n.busy = r.Error, []string{r.Busy}
	}
	os.Remove(netwire.ControlSocket) // of one that was killed
	l, err := net.Listen("unix", netwire.ControlSocket)
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		var r netwire.Request
		reply := netwire.Reply{Error: "cannot understand the request"}
		if json.NewDecoder(conn).Decode(&r) == nil {
			switch r.Op {
			case netwire.OpReload:
				reply = n.reload()
			case netwire.OpStats:
				reply = netwire.Reply{Stats: &netwire.Stats{Refused: 7, Connections: len(n.ports), Problem: n.problem, Busy: n.busy}}
			}
		}
		json.NewEncoder(conn).Encode(reply)
		conn.Close()
	}
}

// reload takes the configuration over as a whole, or not at all.
func (n *network) reload() netwire.Reply {
	c, err := netwire.ReadConfig(".")
	if err != nil {
		return netwire.Reply{Error: err.Error()}
	}
	ports := make(map[string]io.Closer)
	for _, text := range c.Publish {
		if open, ok := n.ports[text]; ok {
			ports[text] = open
			continue
		}
		open, err := bind(text)
		if err != nil {
			for text, p := range ports {
				if _, old := n.ports[text]; !old {
					p.Close()
				}
			}
			return netwire.Reply{Error: "port in use: " + text, Busy: text}
		}
		ports[text] = open
	}
	for text, p := range n.ports {
		if _, kept := ports[text]; !kept {
			p.Close()
		}
	}
	n.ports, n.problem, n.busy = ports, "", nil
	data, err := json.Marshal(c)
	if err == nil {
		err = os.WriteFile(inForce, data, 0o600)
	}
	if err != nil {
		return netwire.Reply{Error: err.Error()}
	}
	return netwire.Reply{}
}

func bind(text string) (io.Closer, error) {
	p, err := netwire.ParsePublication(text)
	if err != nil {
		return nil, err
	}
	if p.Protocol == "udp" {
		return net.ListenPacket("udp", p.Host.String())
	}
	return net.Listen("tcp", p.Host.String())
}
