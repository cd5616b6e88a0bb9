package apply

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

// Many take the folder in turns, each of whom removes it. One at a time has it, and what it
// puts there stays.
func TestLockFolder(t *testing.T) {
	const workers, turns, tries = 4, 100, 1_000_000
	dir := filepath.Join(t.TempDir(), "folder")
	var inside atomic.Int32
	turn := func() error {
		lock, err := lockFolder(dir)
		if err != nil {
			return err
		}
		defer unlockFolder(dir, lock)
		defer inside.Add(-1)
		if inside.Add(1) != 1 {
			return errors.New("two have it at once")
		}
		mine := filepath.Join(dir, "mine")
		if err := os.Mkdir(mine, 0o700); err != nil {
			return err
		}
		runtime.Gosched()
		if err := os.Remove(mine); err != nil {
			return err
		}
		_, err = os.Lstat(filepath.Join(dir, "lock"))
		return err
	}
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			had := 0
			for n := 0; had < turns && n < tries && !t.Failed(); n++ {
				err := turn()
				switch {
				case err == nil:
					had++
				case errors.Is(err, errLocked):
					runtime.Gosched()
				default:
					t.Error(err)
				}
			}
			if had < turns && !t.Failed() {
				t.Errorf("one had only %d turns", had)
			}
		})
	}
	all.Wait()
	if _, err := os.Lstat(dir); err == nil {
		t.Error("the folder is left")
	}
}

func TestTwoAtOnce(t *testing.T) {
	r := busy(t)
	asked := false
	must(t, r.apply(Options{before: func(string) error {
		if !asked {
			asked = true
			fails(t, r.apply(Options{}), "busy", "another apply")
		}
		return nil
	}}))
	if !asked {
		t.Error("there was no second one")
	}
	equal(t, "working tree", state(t, r.host, false), state(t, r.guest, false))
	r.noFolder("at the end")
}
