package fcproc

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/driver"
	"banger/test/need"
)

// machine makes a VM's directory and its spec; the disk is a file.
func machine(t *testing.T, dir string) driver.Spec {
	t.Helper()
	spec := exampleSpec()
	spec.Disks[0].Device = ""
	for _, name := range []string{spec.Kernel, spec.Initrd, spec.Disks[0].Path, spec.Disks[1].Path} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return spec
}

// mounted is a directory on a file system of its own, with the mount's options.
func mounted(t *testing.T, flags uintptr) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("banger-test", dir, "tmpfs", flags, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// probed is a VMM that has found a program of that name.
func probed(name string) *VMM {
	return &VMM{probed: &setup{Firecracker: "/opt/" + name, Jailer: "/opt/jailer", Version: Tested}}
}

type owned struct {
	uid  uint32
	mode uint32
}

func look(t *testing.T, file string) (owned, unix.Stat_t) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(file, &st); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return owned{st.Uid, st.Mode & 0o7777}, st
}

// The jail repeats the VM's directory: the same files, of which the VMM may write to its
// disk alone.
func TestConfine(t *testing.T) {
	need.Need(t, "root")
	v, dir := probed(firecracker), mounted(t, 0)
	spec := machine(t, dir)
	for range 2 { // the second time over the first one's tree
		if err := v.Confine(t.Context(), dir, spec); err != nil {
			t.Fatal(err)
		}
	}
	in := filepath.Join(dir, root(firecracker, spec.ID))
	uid := uint32(spec.UID)
	for name, want := range map[string]owned{
		".": {uid, 0o700}, "run": {uid, 0o700},
		"run/kernel": {0, 0o444}, "run/initrd": {0, 0o444}, "run/modules": {0, 0o444},
		"disk": {uid, 0o600},
	} {
		if got, _ := look(t, filepath.Join(in, name)); got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
	_, a := look(t, filepath.Join(dir, "disk"))
	_, b := look(t, filepath.Join(in, "disk"))
	if a.Ino != b.Ino {
		t.Error("the disk is a copy")
	}
	// What the jailer and a hostile VMM leave goes too, and nothing that it points to.
	if err := os.Symlink(dir, filepath.Join(in, "out")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(filepath.Join(in, "null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	for range 2 { // absent is success
		if err := v.Free(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(filepath.Join(dir, jailBase)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the jail is still there: %v", err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "disk")); err != nil || string(data) != "disk" {
		t.Errorf("the disk: %q, %v", data, err)
	}
}

func TestConfineDevice(t *testing.T) {
	need.Need(t, "root")
	v, dir := probed(firecracker), mounted(t, 0)
	spec := machine(t, dir)
	devices, err := filepath.Glob("/dev/loop[0-9]*")
	if err != nil || len(devices) == 0 {
		devices, _ = filepath.Glob("/dev/[vs]d[a-z]")
	}
	if len(devices) == 0 {
		t.Fatal("this machine has no block device")
	}
	spec.Disks[0].Device = devices[0]
	if err := v.Confine(t.Context(), dir, spec); err != nil {
		t.Fatal(err)
	}
	got, node := look(t, filepath.Join(dir, root(firecracker, spec.ID), "disk"))
	var real unix.Stat_t
	if err := unix.Stat(devices[0], &real); err != nil {
		t.Fatal(err)
	}
	if node.Mode&unix.S_IFMT != unix.S_IFBLK || node.Rdev != real.Rdev || got != (owned{uint32(spec.UID), 0o600}) {
		t.Errorf("%+v, mode %o, device %x, want %x", got, node.Mode, node.Rdev, real.Rdev)
	}
	for device, words := range map[string]string{"/dev/null": "no block device", "/dev/none": "no such file"} {
		spec.Disks[0].Device = device
		if err := v.Confine(t.Context(), dir, spec); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", device, err)
		}
	}
}

// The jailer makes its tree below the name that the program has when links are followed.
func TestConfineForTheProgramsName(t *testing.T) {
	need.Need(t, "root")
	v, dir := probed("firecracker-v1.12.1-x86_64"), mounted(t, 0)
	if err := v.Confine(t.Context(), dir, machine(t, dir)); err != nil {
		t.Fatal(err)
	}
	want := filepath.Join(dir, "run/jail/firecracker-v1.12.1-x86_64/0f9a/root")
	if _, err := os.Stat(filepath.Join(want, "run/kernel")); err != nil {
		t.Error(err)
	}
	if got, err := jailDir(dir); err != nil || got != want {
		t.Errorf("the jail is %q, %v; want %q", got, err, want)
	}
}

// Where the jail cannot work that is said, also for a disk that is a file: the jailer
// makes /dev/kvm in it and a copy of the program.
func TestConfineWhereNothingWorks(t *testing.T) {
	need.Need(t, "root")
	for option, flag := range map[string]uintptr{"nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC} {
		dir := mounted(t, flag)
		err := probed(firecracker).Confine(t.Context(), dir, machine(t, dir))
		if err == nil || !strings.Contains(err.Error(), "mounted with "+option) {
			t.Errorf("%s: %v", option, err)
		}
	}
}

func TestConfineNeedsProbe(t *testing.T) {
	dir := t.TempDir()
	if err := New().Confine(t.Context(), dir, machine(t, dir)); !errors.Is(err, errNotProbed) {
		t.Errorf("%v", err)
	}
}

// fakeAPI listens where Firecracker does.
type fakeAPI struct {
	mu     sync.Mutex
	calls  []string
	refuse string // a path
}

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil || !json.Valid(body) {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, r.Method+" "+r.URL.Path)
	if r.URL.Path == f.refuse {
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `{"fault_message":"no \u001b[31m such thing"}`)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (f *fakeAPI) listen(t *testing.T, dir, id string) {
	t.Helper()
	run := filepath.Join(dir, root(firecracker, id), "run")
	if err := os.MkdirAll(run, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(run, "api.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: f}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
}

func TestBootMakesTheCalls(t *testing.T) {
	dir, err := os.MkdirTemp("", "fc")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	spec, v, api := exampleSpec(), New(), new(fakeAPI)
	booted := make(chan error, 1)
	go func() { booted <- v.Boot(t.Context(), dir, spec) }() // before anybody listens
	api.listen(t, dir, spec.ID)
	if err := <-booted; err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, c := range calls(spec) {
		want = append(want, c.Method+" "+c.Path)
	}
	if !slices.Equal(api.calls, want) {
		t.Errorf("calls %q, want %q", api.calls, want)
	}
	if err := v.PowerButton(t.Context(), dir); err != nil {
		t.Error(err)
	}

	api.refuse = "/vsock"
	err = v.Boot(t.Context(), dir, spec)
	if refused := new(fault); !errors.As(err, &refused) || !strings.Contains(err.Error(), `firecracker refused PUT /vsock: "no \x1b[31m such thing"`) {
		t.Errorf("a refusal: %v", err)
	}
	if last := api.calls[len(api.calls)-1]; last != "PUT /vsock" {
		t.Errorf("after a refusal comes %s", last)
	}
}

// A VMM that a guest has taken over cannot lead the daemon to a socket of the host.
func TestLinksInTheJailLeadNowhere(t *testing.T) {
	dir, err := os.MkdirTemp("", "fc")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	v, others, spec := New(), new(fakeAPI), exampleSpec()
	host := filepath.Join(dir, "host")
	others.listen(t, host, "other")
	theirs := filepath.Join(host, root(firecracker, "other"), "run")
	for name, plant := range map[string]func(run string) error{
		"the socket": func(run string) error {
			os.Mkdir(run, 0o700)
			return os.Symlink(filepath.Join(theirs, "api.sock"), filepath.Join(run, "api.sock"))
		},
		"its directory": func(run string) error { return os.Symlink(theirs, run) },
		"a way through ../": func(run string) error {
			return os.Symlink("../../../../../../host/"+root(firecracker, "other")+"/run", run)
		},
	} {
		vm := filepath.Join(dir, "vm")
		run := filepath.Join(vm, root(firecracker, spec.ID), "run")
		if err := errors.Join(os.MkdirAll(filepath.Dir(run), 0o700), plant(run)); err != nil {
			t.Fatal(err)
		}
		if err := v.PowerButton(t.Context(), vm); !errors.Is(err, unix.ELOOP) {
			t.Errorf("%s: %v", name, err)
		}
		if err := v.Boot(t.Context(), vm, spec); !errors.Is(err, unix.ELOOP) {
			t.Errorf("%s: Boot: %v", name, err)
		}
		if err := v.Free(t.Context(), vm); err != nil {
			t.Fatal(err)
		}
	}
	if len(others.calls) > 0 {
		t.Errorf("another VM was told %q", others.calls)
	}
}

func TestBootEndsWithItsContext(t *testing.T) {
	why := errors.New("the process ended")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if err := New().Boot(ctx, t.TempDir(), exampleSpec()); !errors.Is(err, why) {
		t.Errorf("%v", err)
	}
}
