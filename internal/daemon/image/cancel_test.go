package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"banger/internal/daemon/image/imagetest"
	"banger/internal/daemon/imagemgr"
	"banger/internal/daemon/opstate"
)

// TestCancelledAnywhere: a pull whose only caller gives up, at any point of it, is undone;
// from the rename on, which is not broken off half way, it is done. Either way rows and
// files fit, nothing else is left, and a later pull works.
func TestCancelledAnywhere(t *testing.T) {
	for _, kind := range []string{"image", "kernel"} {
		for _, point := range []string{"begun", "unpacking", kind + " built", kind + " moved", kind + " recorded"} {
			for _, full := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/%v", kind, point, full), func(t *testing.T) { cancelledAt(t, kind, point, full) })
			}
		}
	}
}

func cancelledAt(t *testing.T, kind, point string, full bool) {
	giveUp := errors.New("ctrl-c")
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	seen, armed := false, false
	var pulling context.Context // the pull's own
	at := func(here string) {
		if !armed || here != point {
			return
		}
		seen = true
		cancel(giveUp)
		select {
		case <-pulling.Done():
		case <-time.After(20 * time.Second):
		}
	}
	w := newWorld(t, &imagetest.Builder{Before: func(ctx context.Context, _, dir string, _ opstate.Progress) error {
		pulling = ctx
		at("begun")
		// A tool that unpacks, and is ended in the middle of it.
		half := filepath.Join(dir, "tree")
		if err := errors.Join(os.Mkdir(half, 0o700), os.WriteFile(filepath.Join(half, "half"), nil, 0o600)); err != nil {
			return err
		}
		at("unpacking")
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return os.RemoveAll(half)
	}})
	w.hook = at
	pull := func(ctx context.Context) error {
		if kind == "image" {
			_, err := w.Pull(ctx, imagemgr.DebianBookworm, true, quiet{})
			return err
		}
		_, err := w.PullKernel(ctx, imagemgr.DebianCloud, true, quiet{})
		return err
	}
	if full {
		if err := pull(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	before := w.inventory()
	armed = true
	if err := pull(ctx); !errors.Is(err, giveUp) || !seen {
		t.Errorf("the cancelled pull: %v, and it came to %q: %v", err, point, seen)
	}
	armed = false
	done := point == kind+" moved" || point == kind+" recorded"
	if changed := w.inventory() != before; changed != done {
		t.Errorf("cancelled at %q, it is done: %v, want %v; before\n%s\nafter\n%s", point, changed, done, before, w.inventory())
	}
	w.consistent()
	if left := entries(t, w.layout.Cache()); len(left) > 0 {
		t.Errorf("left in the cache: %q", left)
	}
	before = w.inventory()
	if err := pull(context.Background()); err != nil || w.inventory() == before {
		t.Errorf("a later pull: %v, and there is\n%s", err, w.inventory())
	}
	w.consistent()
}

// inventory is every row of the registry, and every directory.
func (w *world) inventory() string {
	w.t.Helper()
	images, err := w.store.Images(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	kernels, err := w.store.Kernels(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	return fmt.Sprintf("%+v %q\n%+v %q", images, entries(w.t, w.layout.Images()), kernels, entries(w.t, w.layout.Kernels()))
}
