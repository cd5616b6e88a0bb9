package conformance

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"banger/internal/daemon/driver"
	"banger/internal/guest/wire"
)

// GuestHost is a running guest with its agent.
type GuestHost struct {
	// Open makes a channel to the guest's agent, as VMM.Channel does for the given
	// magic: nil stands for the guest's own. The suite never has two of the guest's
	// own open at once.
	Open func(magic []byte) driver.Channel
	// ID is what the agent's hello must say: the identity of the guest.
	ID string
	// Exec says that the guest can run cat.
	Exec bool
	// NoMagic says that the channel has no use for a magic: its socket is one guest's.
	NoMagic bool
}

// Channel tests a driver.Channel to a guest that runs.
func Channel(t *testing.T, h GuestHost) {
	t.Run("hello", func(t *testing.T) { testHello(t, h) })
	t.Run("many streams", func(t *testing.T) { testStreams(t, h) })
	t.Run("bulk", func(t *testing.T) { testBulk(t, h) })
	t.Run("dial ends with its context", func(t *testing.T) { testDialContext(t, h) })
	t.Run("close ends streams, not the guest", func(t *testing.T) { testClose(t, h) })
	if !h.NoMagic {
		t.Run("another magic", func(t *testing.T) { testMagic(t, h) })
	}
	t.Run("a daemon that comes back", func(t *testing.T) { testReconnect(t, h) })
}

func (h GuestHost) open(t *testing.T) driver.Channel {
	t.Helper()
	ch := h.Open(nil)
	t.Cleanup(func() { _ = ch.Close() })
	return ch
}

// hello dials and asks who is there.
func (h GuestHost) hello(ctx context.Context, ch driver.Channel) error {
	conn, err := ch.Dial(ctx)
	if err != nil {
		return err
	}
	nonce := rand.Text()
	var hello wire.Hello
	if err := wire.Call(ctx, conn, wire.Request{Op: wire.OpHello, Nonce: nonce}, &hello); err != nil {
		return err
	}
	if hello.Nonce != nonce || hello.ID != h.ID {
		return fmt.Errorf("another guest answers, or another question is answered: %+v", hello)
	}
	return nil
}

func testHello(t *testing.T, h GuestHost) {
	ch := h.open(t)
	for range 3 {
		if err := h.hello(within(t), ch); err != nil {
			t.Fatal(err)
		}
	}
}

func testStreams(t *testing.T, h GuestHost) {
	ch := h.open(t)
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for range 4 {
				if err := h.hello(within(t), ch); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}

func testBulk(t *testing.T, h GuestHost) {
	if !h.Exec {
		t.Skip("the guest runs no commands")
	}
	ch := h.open(t)
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() {
			sent := make([]byte, 3<<20+17)
			rand.Read(sent)
			got, err := cat(within(t), ch, sent)
			if err != nil {
				t.Error(err)
			} else if !bytes.Equal(got, sent) {
				t.Errorf("%d bytes came back, %d were sent, or they differ", len(got), len(sent))
			}
		})
	}
	all.Wait()
}

func cat(ctx context.Context, ch driver.Channel, data []byte) ([]byte, error) {
	conn, err := ch.Dial(ctx)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	exit, err := wire.Run(ctx, conn, wire.Request{Op: wire.OpExec, Acks: true, Exec: &wire.Exec{Argv: []string{"cat"}, Stdin: true}},
		wire.Stdio{In: bytes.NewReader(data), Out: &out, Err: io.Discard})
	if err == nil && exit.Code != 0 {
		err = fmt.Errorf("cat: %+v", exit)
	}
	return out.Bytes(), err
}

func testDialContext(t *testing.T, h GuestHost) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	ch := h.open(t)
	if conn, err := ch.Dial(ctx); !errors.Is(err, context.Canceled) {
		if err == nil {
			conn.Close()
		}
		t.Errorf("Dial with a context that has ended: %v", err)
	}
	if err := h.hello(within(t), ch); err != nil {
		t.Errorf("after that: %v", err)
	}
}

func testClose(t *testing.T, h GuestHost) {
	ch := h.open(t)
	conn, err := ch.Dial(within(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ended := make(chan error, 1)
	go func() {
		_, err := conn.Read(make([]byte, 1))
		ended <- err
	}()
	if err := ch.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a stream without a request gives data")
		}
	case <-within(t).Done():
		t.Error("a stream outlives its channel")
	}
	if _, err := ch.Dial(within(t)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Dial after Close: %v", err)
	}
	if err := ch.Close(); err != nil {
		t.Errorf("a second Close: %v", err)
	}
	if err := h.hello(within(t), h.open(t)); err != nil {
		t.Errorf("the guest is gone with the channel: %v", err)
	}
}

// A guest does not answer to the magic of another boot, and is not harmed by it.
func testMagic(t *testing.T, h GuestHost) {
	magic := make([]byte, wire.MagicLen)
	rand.Read(magic)
	ch := h.Open(magic)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := h.hello(ctx, ch); err == nil {
		t.Error("the guest answers to another magic")
	}
	if err := ch.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := h.hello(within(t), h.open(t)); err != nil {
		t.Errorf("after that: %v", err)
	}
}

// Each daemon makes a channel of its own, the earlier one gone in the midst of a
// transfer.
func testReconnect(t *testing.T, h GuestHost) {
	for range 5 {
		ch := h.Open(nil)
		conn, err := ch.Dial(within(t))
		if err != nil {
			t.Fatal(err)
		}
		// Half a frame, of a request that never comes.
		_, _ = conn.Write([]byte{byte(wire.KindRequest), 0, 0, 1, 0, '{'})
		if err := ch.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
	if err := h.hello(within(t), h.open(t)); err != nil {
		t.Error(err)
	}
}
