package workspace

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"banger/api"
	"banger/internal/daemon/store"
	"banger/internal/guest/agent"
	"banger/internal/guest/wire"
)

func TestPlace(t *testing.T) {
	g := guest{name: "shop"}
	guests := newFakeGuests(t)
	g.dial = func(ctx context.Context) (net.Conn, error) { return guests.Dial(ctx, vmID) }
	for name, c := range map[string]struct {
		make func(top, repo string)
		at   string // below top
		note string
	}{
		"free":         {func(_, _ string) {}, "home/ann/my shop", ""},
		"empty":        {func(_, repo string) { check(t, os.MkdirAll(repo, 0o755)) }, "home/ann/my shop", ""},
		"taken":        {func(_, repo string) { write(t, repo, "file", "x") }, "workspace/my shop", "there are files at"},
		"taken by a":   {func(_, repo string) { write(t, filepath.Dir(repo), filepath.Base(repo), "a file") }, "workspace/my shop", "there are files at"},
		"a file above": {func(top, _ string) { write(t, top, "home", "a file") }, "workspace/my shop", "cannot be made"},
		"both taken": {func(top, repo string) {
			write(t, repo, "file", "x")
			write(t, top, "workspace/my shop/file", "x")
		}, "workspace/my shop-2", "there are files at"},
		"half made": {func(_, repo string) { check(t, os.MkdirAll(filepath.Join(repo, ".git/banger"), 0o755)) }, "home/ann/my shop", ""},
		"volatile":  {nil, "workspace/my shop", "does not last inside"},
	} {
		t.Run(name, func(t *testing.T) {
			top := t.TempDir()
			repo := filepath.Join(top, "home/ann/my shop")
			p := places{fallback: filepath.Join(top, "workspace")}
			if c.make == nil {
				p.volatile = []string{filepath.Join(top, "home")}
			} else {
				c.make(top, repo)
			}
			dir, note, err := p.find(context.Background(), g, Repo{Path: repo, Name: "my shop"})
			check(t, err)
			want(t, "place", dir, filepath.Join(top, c.at))
			if !strings.Contains(note, c.note) || (note == "") != (c.note == "") {
				t.Errorf("note is %q, want %q", note, c.note)
			}
			if info, err := os.Stat(dir); err != nil || !info.IsDir() {
				t.Errorf("nothing was made: %v", err)
			}
		})
	}
	want(t, "the root", guestPlaces().candidate(Repo{Path: "/", Name: "/"}, 1), "/workspace/repository")
	for dir, top := range map[string]string{"/tmp": "/tmp", "/tmp/x": "/tmp", "/tmpx": "", "/home/x": "", "/var/tmp/x": "/var/tmp", "/run/user/1": "/run"} {
		want(t, dir, guestPlaces().volatileTop(dir), top)
	}
}

func TestNoPlace(t *testing.T) {
	guests := newFakeGuests(t)
	g := guest{name: "shop", dial: func(ctx context.Context) (net.Conn, error) { return guests.Dial(ctx, vmID) }}
	top := t.TempDir()
	write(t, top, "home", "a file")
	write(t, top, "workspace", "a file")
	_, _, err := places{fallback: filepath.Join(top, "workspace")}.find(context.Background(), g, Repo{Path: filepath.Join(top, "home/shop"), Name: "shop"})
	wantError(t, err, api.Refused, "there is no free place")
}

// The guest's user owns the repository, root the folders above it.
func TestOwners(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can have another user in the guest")
	}
	w := newWorld(t)
	write(t, w.host, "a/b", "a\n")
	w.commit("first")
	w.guests.agent = agent.New(agent.Options{Config: wire.Config{User: &wire.User{Name: "nobody"}}})
	// The folder of the test and the one above it are for root alone.
	for dir := filepath.Dir(w.host); strings.HasPrefix(dir, os.TempDir()+"/"); dir = filepath.Dir(dir) {
		check(t, os.Chmod(dir, 0o755))
	}
	w.prepare()
	owner := func(path string) uint32 {
		info, err := os.Lstat(path)
		check(t, err)
		return info.Sys().(*syscall.Stat_t).Uid
	}
	nobody := owner(w.inside)
	if nobody == 0 {
		t.Error("the repository belongs to root")
	}
	want(t, "above", owner(filepath.Dir(w.inside)), 0)
	for _, name := range []string{"a/b", ".git/config", ".git/HEAD", ".git/index", ".git/banger/index"} {
		want(t, name, owner(filepath.Join(w.inside, name)), nobody)
	}
	write(t, w.inside, "new", "x\n")
	meta, _ := w.export()
	want(t, "files", meta.Files, 1)

	// Where the user cannot go, the repository cannot be.
	top := t.TempDir()
	check(t, os.Chmod(top, 0o700))
	dir, note, err := places{fallback: filepath.Join(filepath.Dir(w.inside), "fallback")}.find(context.Background(),
		w.m.guest(store.VM{ID: vmID, Name: "shop"}), Repo{Path: filepath.Join(top, "shop"), Name: "shop"})
	check(t, err)
	want(t, "place", dir, filepath.Join(filepath.Dir(w.inside), "fallback/shop"))
	if !strings.Contains(note, "may not be written by nobody") || exists(top, "shop") {
		t.Errorf("note is %q", note)
	}
}
