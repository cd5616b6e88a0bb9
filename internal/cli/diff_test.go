package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/test/need"
)

// withPatch is a shop with a patch that fills every buffer between the daemon and a
// reader. What it sent is told on the channel.
func withPatch(t *testing.T) (d *fakeDaemon, patch []byte, sent chan struct{}) {
	t.Setenv("TMPDIR", t.TempDir())
	d, sent = withShop(t), make(chan struct{})
	chunk := bytes.Repeat([]byte("+0123456789abcdef\n"), 1<<14)
	for range 64 {
		d.patch = append(d.patch, &bangerv1.ExportChunk{Patch: chunk})
		patch = append(patch, chunk...)
	}
	d.patch[0].Meta = &bangerv1.ExportMeta{Head: "abc"}
	d.exported = func(context.Context) error { close(sent); return nil }
	return d, patch, sent
}

func wait(t *testing.T, sent chan struct{}) {
	t.Helper()
	eventually(t, "the daemon has sent all", func() bool {
		select {
		case <-sent:
			return true
		default:
			return false
		}
	})
}

// noTemporary makes sure that no temporary file has a name.
func noTemporary(t *testing.T) {
	t.Helper()
	list, err := os.ReadDir(os.TempDir())
	if err != nil || len(list) > 0 {
		t.Errorf("temporary files: %v, %v", list, err)
	}
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// A pager that is not read on does not hold up the daemon, which has the VM's workspace
// locked while it sends.
func TestDiffNotReadOn(t *testing.T) {
	d, patch, sent := withPatch(t)
	r, w := pipe(t)
	c := d.call()
	c.stdout = w
	c.start("diff")
	wait(t, sent)
	noTemporary(t)
	if err := r.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(patch))
	if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, patch) {
		t.Errorf("the patch is another: %v", err)
	}
	want(t, "exit", c.wait(), 0)
}

func TestDiffClosedPipe(t *testing.T) {
	d, _, _ := withPatch(t)
	r, w := pipe(t)
	r.Close()
	c := d.call()
	c.stdout = w
	want(t, "exit", c.start("diff").wait(), exitBrokenPipe)
	want(t, "stderr", c.err.String(), "")
	noTemporary(t)
}

// Ctrl-C while the patch comes, and while it is printed.
func TestDiffInterrupted(t *testing.T) {
	d, patch, sent := withPatch(t)
	d.exported = func(ctx context.Context) error { close(sent); <-ctx.Done(); return ctx.Err() }
	c := d.call().start("diff")
	wait(t, sent)
	noTemporary(t)
	c.kill(syscall.SIGINT)
	want(t, "exit", c.wait(), exitInterrupted)
	want(t, "printed", len(c.out.String()), 0)
	noTemporary(t)

	ctx, cancel := context.WithCancel(context.Background())
	a := newApp(nil, writerFunc(func(b []byte) (int, error) { cancel(); return len(b), nil }), io.Discard, nil)
	rest := bytes.NewReader(patch)
	if err := a.printPatch(ctx, rest); !errors.Is(err, context.Canceled) || rest.Len() == 0 {
		t.Errorf("interrupted while it prints: %v, %d bytes are left", err, rest.Len())
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// TestDiffCutOff: of a patch that has begun to come nothing is asked for again, and nothing
// is printed.
func TestDiffCutOff(t *testing.T) {
	d, _, _ := withPatch(t)
	d.patch, d.exported = d.patch[:1], func(context.Context) error { return api.Errorf(api.Stopping, "the daemon is shutting down") }
	want(t, "diff", d.run("diff", "shop"), result{exitRefused, "", "banger: the daemon is shutting down\n"})
	want(t, "requests", d.called(), `export {"ref":"shop"}`)

	d.patch[0].Meta = nil
	want(t, "without a head", d.run("diff", "shop"), result{exitFailed, "", "banger: the daemon does not say what the patch is of\n"})
}

func TestDiffNoRoom(t *testing.T) {
	need.Need(t, "root")
	d, _, _ := withPatch(t)
	if err := unix.Mount("tmpfs", os.TempDir(), "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(os.TempDir(), 0); err != nil {
			t.Errorf("the test's file system stays mounted: %v", err)
		}
	})
	r := d.run("diff")
	want(t, "exit", r.code, exitFailed)
	contains(t, "stderr", r.err, "banger: cannot keep the patch: write "+os.TempDir(), "no space left on device\nhint: df -h "+os.TempDir())
}
