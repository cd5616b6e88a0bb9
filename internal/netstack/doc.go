// Package netstack is the network of one VM, which the process banger-net carries: a
// TCP/IP stack in user mode (gVisor's) between QEMU's network card and ordinary sockets
// of the host. It needs no rights, and nothing reaches the host's network but what the
// policy permits.
//
//	guest ── QEMU ── run/net.sock ── link ── gVisor's stack ─┬─ gate ─ splice ── socket of the host
//	                                                         ├─ resolver ─────── the host's resolvers
//	                      a port of the host ── publisher ───┘
//
// The stack answers in the name of every address that the guest asks for. Whatever it
// asks goes through the gate, which judges by the policy in force and writes down what it
// refuses; a connection of the guest ends here and a second one, of this process, goes on
// from here. So the guest never sends a packet to the outside: the odd ones (fragments,
// forged sources, broken checksums) end in the stack.
//
// All that a guest can make this process hold is bounded in limits.go. The daemon's part
// is package netwire.
package netstack
