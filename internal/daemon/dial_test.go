package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"strings"
	"testing"

	"banger/api"
	"banger/internal/guest/wire"
)

// TestStreamsTake: a stream carries its own operation and nothing that came along.
func TestStreamsTake(t *testing.T) {
	all := wire.Request{Op: "x", Acks: true, Exec: &wire.Exec{Argv: []string{"true"}}, Dial: &wire.Dial{Network: "tcp"}, Shutdown: &wire.Shutdown{Verb: "poweroff"}}
	for _, g := range guestStreams() {
		req, ok := g.take(all)
		got, err := json.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		wanted := map[string]string{
			"exec": `{"op":"exec","exec":{"argv":["true"]},"acks":true}`,
			"dial": `{"op":"dial","dial":{"network":"tcp","address":""},"acks":true}`,
		}[g.op]
		if !ok || string(got) != wanted {
			t.Errorf("%s: %s, not %s", g.op, got, wanted)
		}
		if _, ok := g.take(wire.Request{Op: g.op}); ok {
			t.Errorf("%s: a request without what it needs is taken", g.op)
		}
		for _, k := range g.host {
			if !k.FromHost() || k == wire.KindRequest {
				t.Errorf("%s: a client may send frames of kind %d", g.op, k)
			}
		}
		for _, k := range g.guest {
			if !k.FromGuest() || k == wire.KindReply {
				t.Errorf("%s: a guest may send frames of kind %d", g.op, k)
			}
		}
	}
}

// TestFirstFrame: what is no request of the stream's own operation is refused before any
// guest is asked.
func TestFirstFrame(t *testing.T) {
	for name, frame := range map[string]struct {
		kind    wire.Kind
		payload string
	}{
		"another operation": {wire.KindRequest, `{"op":"shutdown","shutdown":{"verb":"poweroff"},"dial":{}}`},
		"exec":              {wire.KindRequest, `{"op":"exec","exec":{"argv":["true"]}}`},
		"no address":        {wire.KindRequest, `{"op":"dial"}`},
		"no request":        {wire.KindStdin, `{"op":"dial","dial":{}}`},
		"no JSON":           {wire.KindRequest, `{`},
	} {
		client, server := net.Pipe()
		go wire.WriteFrame(client, frame.kind, []byte(frame.payload))
		err := (&Daemon{}).relay(context.Background(), "id", wire.NewStream(server), dialStream())
		if api.CodeOf(err) != api.Invalid || !strings.Contains(err.Error(), "a request to dial") {
			t.Errorf("%s: %v", name, err)
		}
		client.Close()
		server.Close()
	}
}

func TestDialNeedsUpgrade(t *testing.T) {
	w := &answer{header: http.Header{}}
	r, err := http.NewRequest(http.MethodPost, "http://banger/v1/dial?vm=nobody", nil)
	if err != nil {
		t.Fatal(err)
	}
	(&Daemon{}).serveStream(w, r, dialStream())
	if w.status != http.StatusUpgradeRequired || !strings.Contains(w.String(), "dial needs POST with Upgrade: banger-stream/1") {
		t.Errorf("%d %s", w.status, w.String())
	}
}

// answer keeps what a handler answers.
type answer struct {
	bytes.Buffer
	header http.Header
	status int
}

func (a *answer) Header() http.Header    { return a.header }
func (a *answer) WriteHeader(status int) { a.status = status }
