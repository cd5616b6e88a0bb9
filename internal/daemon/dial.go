package daemon

import "banger/internal/guest/wire"

// dialStream is one connection to a service inside a guest, through its agent: neither
// the VM's network nor its policy has a part in it.
func dialStream() guestStream {
	return guestStream{
		op: wire.OpDial,
		take: func(r wire.Request) (wire.Request, bool) {
			return wire.Request{Op: wire.OpDial, Dial: r.Dial, Acks: r.Acks}, r.Dial != nil
		},
		host:  []wire.Kind{wire.KindStdin, wire.KindStdinEOF, wire.KindStdoutAck},
		guest: []wire.Kind{wire.KindStarted, wire.KindStdout, wire.KindStdoutEOF, wire.KindStdinAck, wire.KindExit, wire.KindError},
	}
}
