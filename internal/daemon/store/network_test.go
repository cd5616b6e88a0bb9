package store

import (
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pressly/goose/v3"

	"banger/internal/netwire"
)

// TestMigrateNetwork: a VM of a database of schema 2 gets the internet, and keeps the rest.
func TestMigrateNetwork(t *testing.T) {
	path := filepath.Join(t.TempDir(), "banger.db")
	db, err := sql.Open("sqlite", dsn(path, ""))
	must(t, err)
	files, err := fs.Sub(migrations, "migrations")
	must(t, err)
	p, err := goose.NewProvider(goose.DialectSQLite3, db, files)
	must(t, err)
	_, err = p.UpTo(t.Context(), 2)
	must(t, err)
	v := testVM(1)
	for _, insert := range []struct {
		query  string
		values []any
	}{
		{`INSERT INTO kernels (` + kernelColumns + `) VALUES ('debian-cloud', '', '', '', 0, '[]', 0)`, nil},
		{`INSERT INTO images (` + imageColumns + `) VALUES ('img', 'debian-bookworm', 'debian-cloud', 0, 1, '', '', 1, 0)`, nil},
		{`INSERT INTO vms (` + vmStateColumns + `) VALUES ` + vmStatePlaces, vmStateValues(v)},
	} {
		_, err := db.Exec(insert.query, insert.values...)
		must(t, err)
	}
	must(t, db.Close())

	s := open(t, path)
	v.Network = netwire.Network{Preset: "internet"}
	got, err := s.VM(t.Context(), v.ID)
	must(t, err)
	if d := cmp.Diff(v, got); d != "" {
		t.Error(d)
	}
}

// TestDamagedNetwork: one value that cannot be read costs its VM the network, not a list of
// all VMs, and stays for somebody to look at until it is set.
func TestDamagedNetwork(t *testing.T) {
	s := filled(t)
	ctx := t.Context()
	for n, text := range []string{"", "{", `"lan"`, "null", "{}", `{"preset":7}`} {
		v := testVM(n + 1)
		must(t, s.InsertVM(ctx, v))
		_, err := s.writer.Exec("UPDATE vms SET network = ? WHERE id = ?", text, v.ID)
		must(t, err)
		_, err = s.Transition(ctx, v.ID, []State{Creating}, Stopped, nil)
		must(t, err)
		list, err := s.VMs(ctx)
		must(t, err)
		got := list[n]
		if d := cmp.Diff(netwire.Network{Preset: "none"}, got.Network); d != "" || !strings.Contains(got.NetworkProblem, "cannot be understood") {
			t.Errorf("%q: %s, %q", text, d, got.NetworkProblem)
		}
		got, err = s.SetNetwork(ctx, v.ID, got.Network, testNetwork())
		must(t, err)
		if d := cmp.Diff(testNetwork(), got.Network); d != "" || got.NetworkProblem != "" {
			t.Errorf("%q, set: %s, %q", text, d, got.NetworkProblem)
		}
	}
}

// TestSetNetworkIsCompareAndSet: a change is made to what its caller saw, or not at all.
func TestSetNetworkIsCompareAndSet(t *testing.T) {
	s := filled(t)
	ctx := t.Context()
	v := testVM(1)
	must(t, s.InsertVM(ctx, v))
	if _, err := s.SetNetwork(ctx, v.ID, netwire.Network{Preset: "none"}, testNetwork()); !errors.Is(err, ErrNetworkChanged) {
		t.Errorf("another network: %v", err)
	}
	if _, err := s.SetNetwork(ctx, "absent", testNetwork(), testNetwork()); !errors.Is(err, ErrNotFound) {
		t.Errorf("no VM: %v", err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var won []netwire.Network
	for n := range 8 {
		wg.Go(func() {
			to := netwire.Network{Preset: "none", Allow: []string{fmt.Sprintf("host%d", n)}}
			got, err := s.SetNetwork(ctx, v.ID, v.Network, to)
			if err != nil && !errors.Is(err, ErrNetworkChanged) {
				t.Error(err)
			}
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				won = append(won, got.Network)
			}
		})
	}
	wg.Wait()
	got, err := s.VM(ctx, v.ID)
	must(t, err)
	if len(won) != 1 || cmp.Diff(won[0], got.Network) != "" {
		t.Errorf("%v won, the record has %v", won, got.Network)
	}
	v.Network = got.Network
	if d := cmp.Diff(v, got); d != "" {
		t.Errorf("beside the network: %s", d)
	}
}
