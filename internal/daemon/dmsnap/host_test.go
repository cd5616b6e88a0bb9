package dmsnap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/driver"
	"banger/internal/daemon/driver/conformance"
	"banger/internal/daemon/hostcmd"
	"banger/test/need"
)

const instance = "c0ffee"

// testHost is for the tests of a real device-mapper: all is gone when they end.
func testHost(t *testing.T) *Disk {
	t.Helper()
	need.Need(t, "testhost")
	t.Cleanup(func() { clean(t, instance) })
	return New(instance)
}

// clean fails the test if something bears the mark of the instance.
func clean(t *testing.T, instance string) {
	t.Helper()
	noLoops(t, mark(instance))
	if left, err := (devices{mark(instance)}).List(context.Background()); err != nil || len(left) != 0 {
		t.Errorf("devices are left: %v, %v", left, err)
		for _, o := range left {
			_ = removeDevice(context.Background(), o.Name)
		}
	}
}

func attached(t *testing.T, d *Disk, vm, path string) driver.Attached {
	t.Helper()
	a, err := d.Attach(t.Context(), vm, path)
	must(t, err)
	t.Cleanup(func() { _ = d.Detach(context.Background(), vm, path, a) })
	return a
}

func run(t *testing.T, argv ...string) {
	t.Helper()
	_, err := hostcmd.Run(t.Context(), hostcmd.Command{Argv: argv})
	must(t, err)
}

// put writes to a device and waits until it is there.
func put(path string, b []byte, at int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, at)
	return errors.Join(err, f.Sync(), f.Close())
}

func get(t *testing.T, path string, at int64, n int) []byte {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	b := make([]byte, n)
	_, err = f.ReadAt(b, at)
	must(t, err)
	return b
}

func TestConforms(t *testing.T) {
	testHost(t)
	conformance.Disk(t, func(*testing.T) driver.Disk { return New(instance) }, func(t *testing.T) string { return t.TempDir() })
}

func TestProbeFindsIt(t *testing.T) {
	d := testHost(t)
	dir := t.TempDir()
	must(t, d.Probe(t.Context(), dir))
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("the probe leaves %v, %v", entries, err)
	}
}

// steps is a context that calls end when it is asked for the n-th time whether it is
// over: Attach asks before each step.
type steps struct {
	context.Context
	left *int
	end  func() error
}

func (s steps) Err() error {
	if *s.left--; *s.left < 0 {
		return s.end()
	}
	return nil
}

func (s steps) Value(any) any { return nil }

// maxSteps is more than Attach has.
const maxSteps = 20

func TestAttachUndoes(t *testing.T) {
	d := testHost(t)
	base, path := stateDir(t, 3*mib)
	must(t, d.Create(t.Context(), base, path, 8*mib))
	why := errors.New("this step fails")
	for n := range maxSteps {
		left := n
		a, err := d.Attach(steps{context.Background(), &left, func() error { return why }}, "a", path)
		if err == nil {
			if n < 5 {
				t.Errorf("only %d steps", n)
			}
			must(t, d.Detach(t.Context(), "a", path, a))
			return
		}
		if !errors.Is(err, why) {
			t.Errorf("step %d: %v", n, err)
		}
		clean(t, instance)
	}
	t.Error("it does not end")
}

// A dmsetup that fails after its work, or hangs in it, is undone too.
func TestAttachUndoesDmsetup(t *testing.T) {
	d := testHost(t)
	base, path := stateDir(t, 3*mib)
	must(t, d.Create(t.Context(), base, path, 8*mib))
	for name, script := range map[string]string{
		"before": `[ $1 != create ] || { echo "device-mapper: create ioctl on x failed: Device or resource busy" >&2; exit 1; }`,
		"after":  `[ $1 != create ] || { "$real" "$@" && exit 1; }`,
		"hangs":  `[ $1 != create ] || { "$real" "$@"; sleep 60; exit 1; }`,
	} {
		t.Run(name, func(t *testing.T) {
			fakeDmsetup(t, script)
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			if _, err := d.Attach(ctx, "a", path); err == nil || name == "before" && !errors.Is(err, unix.EBUSY) {
				t.Errorf("error %v", err)
			}
			clean(t, instance)
		})
	}
	must(t, d.Detach(t.Context(), "a", path, attached(t, d, "a", path)))
}

// fakeDmsetup puts a script before dmsetup.
func fakeDmsetup(t *testing.T, script string) {
	t.Helper()
	real, err := hostcmd.LookPath(Program)
	must(t, err)
	dir := t.TempDir()
	text := "#!/bin/sh\nreal=" + real + "\n" + script + "\nexec \"$real\" \"$@\"\n"
	must(t, os.WriteFile(filepath.Join(dir, Program), []byte(text), 0o755))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

const (
	childEnv = "BANGER_TEST_DMSNAP_CHILD" // VERB STEP PATH
	dieCode  = "kill -9 $PPID; sleep 60"
)

// TestMain is the process that is killed, too.
func TestMain(m *testing.M) {
	text := os.Getenv(childEnv)
	if text == "" {
		os.Exit(m.Run())
	}
	var verb, path string
	var n int
	if _, err := fmt.Sscan(text, &verb, &n, &path); err != nil {
		panic(err)
	}
	ctx := steps{context.Background(), &n, func() error { return unix.Kill(os.Getpid(), unix.SIGKILL) }}
	d := New(instance)
	var err error
	if verb == "attach" {
		_, err = d.Attach(ctx, "a", path)
	} else {
		err = d.Detach(ctx, "a", path, driver.Attached{})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// child is killed, or ends well.
func child(t *testing.T, verb string, step int, path string) (killed bool) {
	t.Helper()
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %s", childEnv, verb, step, path))
	c.Stderr = os.Stderr
	err := c.Run()
	if err != nil && c.ProcessState.Sys().(interface{ Signaled() bool }).Signaled() {
		return true
	}
	must(t, err)
	return false
}

// recoverAll does what a daemon does after a crash, and looks that nothing is left.
func recoverAll(t *testing.T, root string) {
	t.Helper()
	for _, i := range Inventories(instance, root) {
		objects, err := i.List(t.Context())
		must(t, err)
		for _, o := range objects {
			if o.VM != "a" {
				t.Errorf("%+v", o)
			}
			must(t, i.Remove(t.Context(), o))
		}
	}
	clean(t, instance)
}

func TestKilled(t *testing.T) {
	d := testHost(t)
	base, path := stateDir(t, 3*mib)
	root := filepath.Dir(filepath.Dir(filepath.Dir(path)))
	must(t, d.Create(t.Context(), base, path, 8*mib))
	a := attached(t, d, "a", path)
	must(t, put(a.Path, []byte("kept"), 4096))
	must(t, d.Detach(t.Context(), "a", path, a))

	check := func(what string) {
		t.Helper()
		// With nothing between: a start takes away what the crash left.
		a := attached(t, d, "a", path)
		if got := get(t, a.Path, 4096, 4); string(got) != "kept" {
			t.Errorf("%s: the disk has %q", what, got)
		}
		must(t, d.Detach(t.Context(), "a", path, a))
		clean(t, instance)
	}
	for n := range maxSteps {
		if !child(t, "attach", n, path) {
			if n < 5 {
				t.Errorf("only %d steps", n)
			}
			break
		}
		check(fmt.Sprintf("step %d", n))
		child(t, "attach", n, path)
		recoverAll(t, root)
	}
	recoverAll(t, root) // the one that was attached

	for _, verb := range []string{"create", "remove"} {
		for when, script := range map[string]string{
			"before": fmt.Sprintf("[ $1 != %s ] || { %s; }", verb, dieCode),
			"after":  fmt.Sprintf(`[ $1 != %s ] || { "$real" "$@"; %s; }`, verb, dieCode),
			"amid":   fmt.Sprintf(`[ $1 != %s ] || { kill -9 $PPID; }`, verb),
		} {
			for _, undo := range []func(){func() { check(verb + " " + when) }, func() { recoverAll(t, root) }} {
				func() {
					path0 := os.Getenv("PATH")
					defer os.Setenv("PATH", path0)
					if verb == "remove" {
						attached(t, d, "a", path)
					}
					fakeDmsetup(t, script)
					if !child(t, map[string]string{"create": "attach", "remove": "detach"}[verb], maxSteps, path) {
						t.Errorf("%s %s: it was not killed", verb, when)
					}
				}()
				undo()
			}
		}
	}
}

func TestBusy(t *testing.T) {
	d := testHost(t)
	base, path := stateDir(t, 3*mib)
	must(t, d.Create(t.Context(), base, path, 8*mib))
	a := attached(t, d, "a", path)
	f, err := os.Open(a.Path)
	must(t, err)
	defer f.Close()

	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := d.Detach(ctx, "a", path, a); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "the device banger-c0ffee-a is still in use") {
		t.Errorf("Detach: %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := d.Attach(ctx, "a", path); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "what an earlier start made: ") {
		t.Errorf("Attach over one in use: %v", err)
	}
	// It is tried again until nobody has it.
	time.AfterFunc(300*time.Millisecond, func() { f.Close() })
	must(t, d.Detach(t.Context(), "a", path, a))
	clean(t, instance)
}

func TestParallel(t *testing.T) {
	d := testHost(t)
	base, path := stateDir(t, 3*mib)
	root := filepath.Dir(filepath.Dir(path))
	var all sync.WaitGroup
	for i := range 6 {
		vm := fmt.Sprintf("p%d", i)
		p := filepath.Join(root, vm, "disk")
		must(t, os.MkdirAll(filepath.Dir(p), 0o700))
		all.Go(func() {
			err := d.Create(t.Context(), base, p, 8*mib)
			a, aerr := d.Attach(t.Context(), vm, p)
			if err := errors.Join(err, aerr); err != nil {
				t.Error(err)
				return
			}
			err = put(a.Path, []byte(vm), 4*mib)
			data, rerr := os.ReadFile(a.Path)
			if rerr != nil || len(data) != 8*mib || string(data[4*mib:4*mib+2]) != vm || !bytes.HasPrefix(data, []byte("image ")) {
				t.Errorf("%s: %d bytes, %v", vm, len(data), rerr)
			}
			if err := errors.Join(err, d.Detach(t.Context(), vm, p, a)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

// Two daemons on one host, with VMs of the same id.
func TestTwoInstances(t *testing.T) {
	d := testHost(t)
	other := New("beef00")
	t.Cleanup(func() { clean(t, "beef00") })
	_, path := stateDir(t, 3*mib)
	base2, path2 := stateDir(t, 3*mib)
	must(t, d.Create(t.Context(), filepath.Join(filepath.Dir(path), "../../images/i/rootfs.ext4"), path, 8*mib))
	must(t, other.Create(t.Context(), base2, path2, 8*mib))
	attached(t, d, "a", path)
	theirs := attached(t, other, "a", path2)
	must(t, put(theirs.Path, []byte("theirs"), 0))

	recoverAll(t, filepath.Dir(filepath.Dir(filepath.Dir(path))))
	must(t, d.Detach(t.Context(), "a", path2, theirs)) // even when told the wrong name
	for _, i := range Inventories("beef00", filepath.Dir(filepath.Dir(filepath.Dir(path2)))) {
		objects, err := i.List(t.Context())
		if want := map[string]int{"dm": 1, "loop": 2}[i.Kind()]; err != nil || len(objects) < want {
			t.Errorf("%s: %v, %v", i.Kind(), objects, err)
		}
		for _, o := range objects {
			stranger := Inventories(instance, "/")[0]
			if err := stranger.Remove(t.Context(), o); err == nil && o.Kind == "dm" {
				t.Errorf("%+v is removed by another instance", o)
			}
		}
	}
	if got := get(t, theirs.Path, 0, 6); string(got) != "theirs" {
		t.Errorf("the other instance's disk has %q", got)
	}
	must(t, other.Detach(t.Context(), "a", path2, theirs))
	if _, err := other.Status(t.Context(), "a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Status of none: %v", err)
	}
}

// What Attach costs, beside the bare commands that make the same devices.
func BenchmarkAttach(b *testing.B) {
	if os.Getenv("BANGER_TEST_HOST") == "" {
		b.Skip("needs testhost")
	}
	dir := b.TempDir()
	base, path, store := filepath.Join(dir, "image"), filepath.Join(dir, "disk"), filepath.Join(dir, "store")
	tail := filepath.Join(dir, "tail")
	d := New(instance)
	if err := errors.Join(os.WriteFile(base, make([]byte, 64*mib), 0o600), d.Create(b.Context(), base, path, 128*mib),
		os.WriteFile(store, nil, 0o600), os.Truncate(store, storeSize(64*mib)),
		os.WriteFile(tail, nil, 0o600), os.Truncate(tail, 64*mib)); err != nil {
		b.Fatal(err)
	}
	script := func(text string) {
		if out, err := exec.Command("sh", "-c", "set -e\n"+text, "sh", base, store, tail).CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
	}
	times := map[string][]time.Duration{}
	measure := func(name string, f func()) {
		begin := time.Now()
		f()
		times[name] = append(times[name], time.Since(begin))
	}
	for b.Loop() {
		var a driver.Attached
		measure("Attach", func() {
			var err error
			if a, err = d.Attach(b.Context(), "a", path); err != nil {
				b.Fatal(err)
			}
		})
		measure("Detach", func() {
			if err := d.Detach(b.Context(), "a", path, a); err != nil {
				b.Fatal(err)
			}
		})
		measure("bare attach", func() {
			script(`base=$(losetup -f --show -r "$1"); store=$(losetup -f --show "$2"); tail=$(losetup -f --show "$3")
printf '%s\n' "0 131072 snapshot $base $store PO 8" "131072 131072 linear $tail 0" | dmsetup create --noudevrules --noudevsync bare`)
		})
		measure("bare detach", func() {
			script(`dmsetup remove --retry --noudevrules --noudevsync bare
for f; do losetup -d $(losetup -n -O NAME -j "$f"); done`)
		})
	}
	for _, name := range slices.Sorted(maps.Keys(times)) {
		all := times[name]
		slices.Sort(all)
		n := len(all)
		b.Logf("%s: n %d, median %v, quartiles %v %v", name, n, all[n/2], all[n/4], all[n*3/4])
	}
}
