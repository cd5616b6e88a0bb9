package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"banger/internal/netwire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t testing.TB, path string) *Store {
	t.Helper()
	s, err := Open(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func testTime() time.Time { return time.Date(2026, 11, 24, 10, 30, 0, 123456789, time.UTC) }

func testImage(id, name string) Image {
	return Image{ID: id, Name: name, Kernel: "debian-cloud", Size: 2 << 30, Managed: true, Source: "debian bookworm", Recipe: "r1", OwnUser: true, CreatedAt: testTime()}
}

func testKernel(name string) Kernel {
	return Kernel{Name: name, Version: "6.1.0-cloud-amd64", Source: "debian", Recipe: "k1", Size: 80 << 20, Modules: []string{"virtio_blk.ko", "ext4.ko"}, CreatedAt: testTime()}
}

func testVM(n int) VM {
	return VM{ID: fmt.Sprintf("id%04d", n), Name: fmt.Sprintf("vm-%04d", n), State: Creating, Slot: n, ImageID: "img", Kernel: "debian-cloud",
		CPUs: 4, Memory: 4 << 30, Disk: 20 << 30, DiskDriver: "reflink", MachineID: strings.Repeat("a", 32),
		User: User{Name: "ann", UID: 1000, GID: 1001}, Owner: 1000, RemoveOnRelease: true, Repository: fmt.Sprintf("/src/%d", n),
		CreatedAt: testTime(), LastError: "no space", Ended: "powered off", Reboot: true, Network: testNetwork()}
}

func testNetwork() netwire.Network {
	return netwire.Network{Preset: "lan", Allow: []string{"github.com:443"}, Deny: []string{"10.0.0.0/8"}, Publish: []string{"127.0.0.1:8080:80/tcp"}}
}

// filled is a store with an image and a kernel that VMs can be made from.
func filled(t testing.TB) *Store {
	t.Helper()
	s := open(t, filepath.Join(t.TempDir(), "banger.db"))
	must(t, s.ReplaceKernel(t.Context(), testKernel("debian-cloud")))
	must(t, s.InsertImage(t.Context(), testImage("img", "debian-bookworm")))
	return s
}

func TestRecordsComeBackAsTheyWent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a ?#%41&b=1.db")
	s := open(t, path)
	ctx := t.Context()
	bare := Kernel{Name: "bare"}
	must(t, s.ReplaceKernel(ctx, testKernel("debian-cloud")))
	must(t, s.ReplaceKernel(ctx, bare))
	must(t, s.InsertImage(ctx, testImage("img", "debian-bookworm")))
	vm := testVM(1)
	must(t, s.InsertVM(ctx, vm))
	w := Workspace{VMID: vm.ID, HostPath: "/src/1", GuestPath: "/src/1", Head: "abc", BaseTree: "def", PreparedAt: testTime()}
	must(t, s.PutWorkspace(ctx, w))
	must(t, s.Close())

	s = open(t, path)
	got, err := s.VM(ctx, vm.ID)
	must(t, err)
	if d := cmp.Diff(vm, got); d != "" {
		t.Error(d)
	}
	image, err := s.Image(ctx, "img")
	must(t, err)
	byName, err := s.ImageByName(ctx, "debian-bookworm")
	must(t, err)
	if d := cmp.Diff([]Image{testImage("img", "debian-bookworm"), testImage("img", "debian-bookworm")}, []Image{image, byName}); d != "" {
		t.Error(d)
	}
	kernels, err := s.Kernels(ctx)
	must(t, err)
	if d := cmp.Diff([]Kernel{bare, testKernel("debian-cloud")}, kernels); d != "" {
		t.Error(d)
	}
	k, err := s.Kernel(ctx, "debian-cloud")
	must(t, err)
	if d := cmp.Diff(testKernel("debian-cloud"), k); d != "" {
		t.Error(d)
	}
	must(t, s.SetChanges(ctx, vm.ID, 3, testTime().Add(time.Hour)))
	w.Changes, w.ChangesAt = 3, testTime().Add(time.Hour)
	for _, read := range []func() (Workspace, error){
		func() (Workspace, error) { return s.Workspace(ctx, vm.ID) },
		func() (Workspace, error) { m, err := s.Workspaces(ctx); return m[vm.ID], err },
	} {
		gotW, err := read()
		must(t, err)
		if d := cmp.Diff(w, gotW); d != "" {
			t.Error(d)
		}
	}
}

// TestRecordJSON: record.json is read by every later release.
func TestRecordJSON(t *testing.T) {
	got, err := json.Marshal(testVM(1))
	must(t, err)
	want := `{"id":"id0001","name":"vm-0001","state":"creating","slot":1,"image_id":"img","kernel":"debian-cloud","cpus":4,"memory":4294967296,` +
		`"disk":21474836480,"disk_driver":"reflink","machine_id":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","user":{"name":"ann","uid":1000,"gid":1001},` +
		`"owner":1000,"remove_on_release":true,"repository":"/src/1","created_at":"2026-11-24T10:30:00.123456789Z","last_error":"no space","ended":"powered off","reboot":true,` +
		`"network":{"preset":"lan","allow":["github.com:443"],"deny":["10.0.0.0/8"],"publish":["127.0.0.1:8080:80/tcp"]}}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestWhatIsTaken(t *testing.T) {
	s := filled(t)
	ctx := t.Context()
	must(t, s.InsertVM(ctx, testVM(1)))
	for what, change := range map[string]func(*VM){
		"id":         func(v *VM) { v.ID = "id0001" },
		"name":       func(v *VM) { v.Name = "vm-0001" },
		"slot":       func(v *VM) { v.Slot = 1 },
		"repository": func(v *VM) { v.Repository = "/src/1" },
	} {
		v := testVM(2)
		change(&v)
		err := s.InsertVM(ctx, v)
		var e *ExistsError
		if !errors.As(err, &e) || e.What != what || errors.Is(err, ErrConflict) {
			t.Errorf("%s taken: %v", what, err)
		}
	}
	for n := 2; n < 4; n++ { // no repository is not the same repository
		v := testVM(n)
		v.Repository = ""
		must(t, s.InsertVM(ctx, v))
	}
	var e *ExistsError
	if err := s.InsertImage(ctx, testImage("other", "debian-bookworm")); !errors.As(err, &e) || e.What != "name" {
		t.Errorf("image name taken: %v", err)
	}
	if err := s.InsertImage(ctx, testImage("img", "other")); !errors.As(err, &e) || e.What != "id" {
		t.Errorf("image id taken: %v", err)
	}
	// A change of a record is refused like an insert.
	if _, err := s.Transition(ctx, "id0002", []State{Creating}, Stopped, func(v *VM) { v.Name = "vm-0001" }); !errors.As(err, &e) || e.What != "name" {
		t.Errorf("rename to a taken name: %v", err)
	}
}

func TestWhatIsMissing(t *testing.T) {
	s := filled(t)
	ctx := t.Context()
	_, vmErr := s.VM(ctx, "x")
	_, imageErr := s.Image(ctx, "x")
	_, nameErr := s.ImageByName(ctx, "")
	_, kernelErr := s.Kernel(ctx, "x")
	_, wErr := s.Workspace(ctx, "x")
	_, trErr := s.Transition(ctx, "x", []State{Stopped}, Starting, nil)
	noImage, noKernel := testVM(1), testVM(1)
	noImage.ImageID, noKernel.Kernel = "x", "x"
	for name, err := range map[string]error{
		"vm": vmErr, "image": imageErr, "image without a name": nameErr, "kernel": kernelErr, "workspace": wErr, "transition": trErr,
		"put workspace":         s.PutWorkspace(ctx, Workspace{VMID: "x", HostPath: "/x"}),
		"set changes":           s.SetChanges(ctx, "x", 1, testTime()),
		"insert with no image":  s.InsertVM(ctx, noImage),
		"insert with no kernel": s.InsertVM(ctx, noKernel),
	} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.InsertVM(ctx, noKernel); !strings.Contains(err.Error(), `kernel "x"`) {
		t.Errorf("it does not say what is missing: %v", err)
	}
	if err := s.InsertVM(ctx, noImage); !strings.Contains(err.Error(), `image "x"`) {
		t.Errorf("it does not say what is missing: %v", err)
	}
	for name, err := range map[string]error{
		"vm": s.DeleteVM(ctx, "x"), "image": s.DeleteImage(ctx, "x"),
	} {
		if err != nil {
			t.Errorf("deleting an absent %s: %v", name, err)
		}
	}
}

func TestWhatIsInUseStays(t *testing.T) {
	s := filled(t)
	ctx := t.Context()
	must(t, s.InsertVM(ctx, testVM(1)))
	must(t, s.InsertVM(ctx, testVM(2)))
	if err := s.DeleteImage(ctx, "img"); !errors.Is(err, ErrInUse) {
		t.Errorf("image: %v", err)
	}
	deleteKernel := func() error {
		return s.write(ctx, frees, func(tx *sql.Tx) error {
			_, err := tx.ExecContext(ctx, "DELETE FROM kernels")
			return err
		})
	}
	if err := deleteKernel(); !isForeignKey(err) {
		t.Errorf("kernel: %v", err)
	}
	images, err := s.ImageUses(ctx)
	must(t, err)
	kernels, err := s.KernelUses(ctx)
	must(t, err)
	if images["img"] != 2 || kernels["debian-cloud"] != 2 {
		t.Errorf("uses: %v, %v", images, kernels)
	}
	must(t, s.PutWorkspace(ctx, Workspace{VMID: "id0001", HostPath: "/src/1"}))
	must(t, s.DeleteVM(ctx, "id0001"))
	if _, err := s.Workspace(ctx, "id0001"); !errors.Is(err, ErrNotFound) {
		t.Errorf("the workspace outlived its VM: %v", err)
	}
	must(t, s.DeleteVM(ctx, "id0002"))
	must(t, s.DeleteImage(ctx, "img"))
	must(t, deleteKernel())
}

func TestReplaceImage(t *testing.T) {
	s := filled(t)
	ctx := t.Context()
	must(t, s.ReplaceImage(ctx, testImage("img2", "debian-bookworm")))
	if i, err := s.ImageByName(ctx, "debian-bookworm"); err != nil || i.ID != "img2" {
		t.Errorf("by name: %+v, %v", i, err)
	}
	if i, err := s.Image(ctx, "img"); err != nil || i.Name != "" {
		t.Errorf("the replaced one: %+v, %v", i, err)
	}
	// A replacement that fails changes nothing.
	var e *ExistsError
	if err := s.ReplaceImage(ctx, testImage("img2", "debian-bookworm")); !errors.As(err, &e) || e.What != "id" {
		t.Errorf("an image replaced by itself: %v", err)
	}
	images, err := s.Images(ctx)
	must(t, err)
	if len(images) != 2 || images[0].ID != "img" || images[1].ID != "img2" || images[1].Name != "debian-bookworm" {
		t.Errorf("%+v", images)
	}
}

func TestReplaceKernel(t *testing.T) {
	s := filled(t)
	ctx := t.Context()
	must(t, s.InsertVM(ctx, testVM(1)))
	k := testKernel("debian-cloud")
	k.Version, k.Modules, k.Recipe = "6.2", []string{"a.ko"}, "k2"
	must(t, s.ReplaceKernel(ctx, k))
	got, err := s.Kernel(ctx, "debian-cloud")
	must(t, err)
	if d := cmp.Diff(k, got); d != "" {
		t.Error(d)
	}
	must(t, s.ReplaceKernel(ctx, testKernel("new")))
}

func TestFreeSlot(t *testing.T) {
	s := filled(t)
	ctx := t.Context()
	want := func(n int) {
		t.Helper()
		if got, err := s.FreeSlot(ctx); err != nil || got != n {
			t.Errorf("got %d, %v; want %d", got, err, n)
		}
	}
	want(1)
	must(t, s.InsertVM(ctx, testVM(2)))
	want(1)
	must(t, s.InsertVM(ctx, testVM(1)))
	want(3)
	must(t, s.InsertVM(ctx, testVM(3)))
	must(t, s.InsertVM(ctx, testVM(5)))
	want(4)
	must(t, s.DeleteVM(ctx, testVM(2).ID))
	want(2)
}

func TestTransition(t *testing.T) {
	s := filled(t)
	ctx := t.Context()
	v := testVM(1)
	must(t, s.InsertVM(ctx, v))
	got, err := s.Transition(ctx, v.ID, []State{Creating, Starting}, Stopped, func(v *VM) {
		v.ID, v.CreatedAt, v.State = "other", time.Time{}, Failed // not its to change
		v.Network = netwire.Network{Preset: "host"}
		v.LastError, v.CPUs, v.Repository = "boom", 8, ""
	})
	must(t, err)
	want := v
	want.State, want.LastError, want.CPUs, want.Repository = Stopped, "boom", 8, ""
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	read, err := s.VM(ctx, v.ID)
	must(t, err)
	if d := cmp.Diff(want, read); d != "" {
		t.Error(d)
	}
	called := false
	got, err = s.Transition(ctx, v.ID, []State{Running}, Stopping, func(*VM) { called = true })
	var c *ConflictError
	if !errors.As(err, &c) || c.State != Stopped || !errors.Is(err, ErrConflict) || called {
		t.Errorf("got %v, set was called: %v", err, called)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("the record beside the conflict: %s", d)
	}
	if _, err := s.Transition(ctx, v.ID, nil, Stopping, nil); !errors.Is(err, ErrConflict) {
		t.Errorf("no state expected: %v", err)
	}
	if _, err := s.Transition(ctx, v.ID, []State{Stopped}, "asleep", nil); err == nil {
		t.Error("a state that does not exist was taken")
	}
	if read, err := s.VM(ctx, v.ID); err != nil || read.State != Stopped {
		t.Errorf("after the refusals: %+v, %v", read, err)
	}
}

// TestTransitionIsCompareAndSet: of many that want the same change one gets it.
func TestTransitionIsCompareAndSet(t *testing.T) {
	s := filled(t)
	v := testVM(1)
	v.State = Stopped
	must(t, s.InsertVM(t.Context(), v))
	for range 20 {
		var wg sync.WaitGroup
		var mu sync.Mutex
		won := 0
		for range 8 {
			wg.Go(func() {
				_, err := s.Transition(t.Context(), v.ID, []State{Stopped}, Starting, nil)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					won++
				case !errors.Is(err, ErrConflict):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won != 1 {
			t.Fatalf("%d won", won)
		}
		_, err := s.Transition(t.Context(), v.ID, []State{Starting}, Stopped, nil)
		must(t, err)
	}
}

// TestConstraintsAreTheDatabases: a row that makes no sense is refused whoever
// writes it.
func TestConstraintsAreTheDatabases(t *testing.T) {
	s := filled(t)
	for name, change := range map[string]func(*VM){
		"state": func(v *VM) { v.State = "" }, "slot": func(v *VM) { v.Slot = 0 }, "name": func(v *VM) { v.Name = "" }, "id": func(v *VM) { v.ID = "" },
		"cpus": func(v *VM) { v.CPUs = 0 }, "memory": func(v *VM) { v.Memory = 0 }, "disk": func(v *VM) { v.Disk = -1 },
	} {
		v := testVM(1)
		change(&v)
		if err := s.InsertVM(t.Context(), v); err == nil || errors.As(err, new(*ExistsError)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPragmasAndModes(t *testing.T) {
	s := filled(t)
	for _, c := range []struct {
		db         *sql.DB
		name, want string
	}{
		{s.writer, "journal_mode", "wal"}, {s.writer, "synchronous", "2"}, {s.writer, "foreign_keys", "1"}, {s.writer, "busy_timeout", "5000"},
		{s.reader, "journal_mode", "wal"}, {s.reader, "query_only", "1"},
	} {
		var got string
		must(t, c.db.QueryRow("PRAGMA "+c.name).Scan(&got))
		if got != c.want {
			t.Errorf("%s is %s, want %s", c.name, got, c.want)
		}
	}
	if _, err := s.reader.Exec("DELETE FROM vms"); err == nil {
		t.Error("a reader wrote")
	}
	entries, err := os.ReadDir(filepath.Dir(s.path))
	must(t, err)
	for _, e := range entries {
		if st, err := e.Info(); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", e.Name(), st.Mode(), err)
		}
	}
	if len(entries) != 4 {
		t.Errorf("files: %v", entries)
	}
}

func TestNewerDatabaseIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "banger.db")
	s := open(t, path)
	_, err := s.writer.Exec("INSERT INTO goose_db_version (version_id, is_applied) VALUES (999, 1)")
	must(t, err)
	must(t, s.Close())
	_, err = Open(t.Context(), path)
	if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "999") || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	garbage := filepath.Join(dir, "garbage.db")
	must(t, os.WriteFile(garbage, []byte(strings.Repeat("not a database ", 1000)), 0o600))
	for _, path := range []string{garbage, filepath.Join(dir, "absent", "banger.db"), dir} {
		if _, err := Open(t.Context(), path); err == nil || !strings.Contains(err.Error(), path) || errors.Is(err, ErrFull) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestReadersDoNotWaitForTheWriter: a long transaction does not stop a list.
func TestReadersDoNotWaitForTheWriter(t *testing.T) {
	s := filled(t)
	must(t, s.InsertVM(t.Context(), testVM(1)))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	err := s.write(ctx, grows, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "UPDATE vms SET name = 'renamed'"); err != nil {
			return err
		}
		list, err := s.VMs(ctx)
		if err != nil || len(list) != 1 || list[0].Name != "vm-0001" {
			return fmt.Errorf("got %v, %v", list, err)
		}
		return errors.New("undo")
	})
	if err == nil || err.Error() != "undo" {
		t.Error(err)
	}
	if v, err := s.VM(ctx, "id0001"); err != nil || v.Name != "vm-0001" {
		t.Errorf("not undone: %+v, %v", v, err)
	}
}

func TestEndedContext(t *testing.T) {
	s := filled(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.InsertVM(ctx, testVM(1)); !errors.Is(err, context.Canceled) {
		t.Errorf("insert: %v", err)
	}
	if _, err := s.VMs(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("list: %v", err)
	}
	must(t, s.InsertVM(t.Context(), testVM(1))) // the connection is still good
}

func TestErrFullIsENOSPC(t *testing.T) {
	if !errors.Is(ErrFull, syscall.ENOSPC) {
		t.Error("a caller that asks for ENOSPC does not see it")
	}
}

func manyVMs(t testing.TB, n int) *Store {
	s := filled(t)
	must(t, s.write(context.Background(), grows, func(tx *sql.Tx) error {
		for i := 1; i <= n; i++ {
			if _, err := tx.Exec(`INSERT INTO vms (`+vmColumns+`) VALUES `+vmPlaces, vmValues(testVM(i))...); err != nil {
				return err
			}
		}
		return nil
	}))
	return s
}

// fastest is the best of some lists.
func fastest(t *testing.T, s *Store, n int) time.Duration {
	t.Helper()
	best := time.Hour
	for range 5 {
		start := time.Now()
		list, err := s.VMs(t.Context())
		must(t, err)
		best = min(best, time.Since(start))
		if len(list) != n || list[0].Name != "vm-0001" || list[n-1].Name != fmt.Sprintf("vm-%04d", n) {
			t.Fatalf("%d VMs", len(list))
		}
	}
	return best
}

// The time of a list grows with what is in it, and not faster.
func TestAThousandVMs(t *testing.T) {
	few := fastest(t, manyVMs(t, 50), 50)
	s := manyVMs(t, 1000)
	many := fastest(t, s, 1000)
	if ratio := float64(many) / float64(few); ratio > 100 { // 20, if it were exact
		t.Errorf("a list of 1000 takes %.0f times as long as one of 50: %v, %v", ratio, many, few)
	}
	if n, err := s.FreeSlot(t.Context()); err != nil || n != 1001 {
		t.Errorf("free slot %d, %v", n, err)
	}
}

func BenchmarkVMs(b *testing.B) {
	s := manyVMs(b, 1000)
	for b.Loop() {
		if _, err := s.VMs(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkTransition(b *testing.B) {
	s := manyVMs(b, 100)
	for b.Loop() {
		if _, err := s.Transition(context.Background(), "id0001", []State{Creating}, Creating, nil); err != nil {
			b.Fatal(err)
		}
	}
}
