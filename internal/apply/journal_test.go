package apply

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"banger/api"
	"banger/test/need"
)

// killMode makes the test binary an apply that kills itself ahead of this step, which is a
// number or a name; after the name and a comma, that of a step that fails before. Its
// arguments are the working tree and the patch.
const killMode = "BANGER_APPLY_TEST_KILL"

func TestMain(m *testing.M) {
	at := os.Getenv(killMode)
	if at == "" {
		os.Exit(m.Run())
	}
	n := 0
	at, bad, _ := strings.Cut(at, ",")
	f, err := os.Open(os.Args[2])
	if err == nil {
		_, err = Patch(context.Background(), os.Args[1], f, Options{before: func(step string) error {
			if step == at || strconv.Itoa(n) == at {
				fmt.Print(step)
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {} // until the signal is there
			}
			n++
			if step == bad {
				return unix.EIO
			}
			return nil
		}})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// killed runs an apply in a process that is killed ahead of a step, and returns the name of
// the step, "" when there is no such step.
func (r *repo) killed(at string) (step string) {
	r.t.Helper()
	self, err := os.Executable()
	must(r.t, err)
	cmd := exec.Command(self, r.host, r.patch)
	cmd.Env = append(os.Environ(), killMode+"="+at)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if len(out) == 0 && err != nil || len(out) > 0 && err == nil {
		r.t.Fatalf("at %q: %v: %s", out, err, stderr.String())
	}
	return string(out)
}

// copied is the host's repository once more.
func (r *repo) copied(t *testing.T, to string) *repo {
	t.Helper()
	c := &repo{t: t, host: filepath.Join(to, "host"), guest: r.guest, head: r.head, patch: r.patch}
	must(t, exec.Command("cp", "-a", "--", r.host, c.host).Run())
	return c
}

// An error at any step takes everything back, until all has happened: then it is a note. A
// kill at any step is taken back, or brought to its end, by the next apply.
func TestAllOrNothing(t *testing.T) {
	made := busy(t)
	for _, how := range []struct {
		name string
		try  func(r *repo, k int) (step string)
	}{{"fails", stepFails}, {"is killed", stepIsKilled}} {
		var steps []string
		for k := 0; k < 1000; k++ {
			step := how.try(made.copied(t, t.TempDir()), k)
			if step == "" {
				break
			}
			kind, _, _ := strings.Cut(step, " ")
			if len(steps) == 0 || steps[len(steps)-1] != kind {
				steps = append(steps, kind)
			}
		}
		equal(t, how.name, strings.Join(steps, " "), "journal sync write journal sync put mkdir rename sync journal sync clear")
	}
}

func stepFails(r *repo, k int) (at string) {
	before, after := state(r.t, r.host, false), state(r.t, r.guest, false)
	n := 0
	err := r.apply(Options{before: func(step string) error {
		if n++; n-1 != k {
			return nil
		}
		at = step
		return fmt.Errorf("%s: %w", step, unix.ENOSPC)
	}})
	switch {
	case at == "":
		must(r.t, err)
		r.came(Result{Files: 14})
	case strings.HasPrefix(at, "clear "):
		must(r.t, err)
		if r.result.Files != 14 || len(r.result.Notes) != 1 || !strings.Contains(r.result.Notes[0], "no space left on device; the next apply tries again") {
			r.t.Errorf("%s: %+v", at, r.result)
		}
		must(r.t, r.apply(Options{}))
		equal(r.t, "after "+at, state(r.t, r.host, false), after)
	default:
		fails(r.t, err, api.NoSpace, at)
		equal(r.t, at, state(r.t, r.host, false), before)
	}
	r.noFolder(at)
	return at
}

func stepIsKilled(r *repo, k int) (at string) {
	before, after := state(r.t, r.host, false), state(r.t, r.guest, false)
	at = r.killed(strconv.Itoa(k))
	if at == "" {
		equal(r.t, "working tree", state(r.t, r.host, false), after)
		return ""
	}
	then, said := before, "an earlier apply did not come to its end; it is taken back"
	if at == "sync done" || strings.HasPrefix(at, "clear ") {
		then, said = after, "an earlier apply did not come to its end; all its changes are in place"
	}
	write(r.t, r.host, ".git/banger-apply/journal.new", "{") // it may have come that far, too
	must(r.t, r.apply(Options{Check: true}))
	equal(r.t, "after "+at, state(r.t, r.host, false), then)
	if got := strings.Join(r.result.Notes, "\n"); got != said && k > 0 {
		r.t.Errorf("%s: said %q", at, got)
	}
	r.noFolder(at)
	must(r.t, r.apply(Options{}))
	equal(r.t, "applied after "+at, state(r.t, r.host, false), after)
	return at
}

// Files that somebody touched after the kill are not overwritten by taking back, and do not
// hold it up: they are named, and the rest is taken back.
func TestRecoveryKeepsEdits(t *testing.T) {
	remove := func(r *repo, name string) { must(r.t, os.RemoveAll(filepath.Join(r.host, name))) }
	pipe := func(r *repo, name string) {
		remove(r, name)
		must(r.t, unix.Mkfifo(filepath.Join(r.host, name), 0o600))
	}
	full := func(r *repo, name string) {
		remove(r, name)
		write(r.t, r.host, name+"/mine", "mine\n")
	}
	file := func(r *repo, name string) {
		remove(r, name)
		write(r.t, r.host, name, "edited since\n")
	}
	const lost, changed = " is left as it is: somebody removed or replaced OLD, its former content", " was changed meanwhile and is left as it is; its former content is OLD"
	for _, c := range []struct {
		what  string
		do    func(r *repo, name string)
		path  string // whose second name is OLD
		name  string // what is touched
		note  string
		stays []string // and is not as it was before
	}{
		{"edited", file, "edited", "edited", changed, []string{"edited", "OLD"}},
		{"becomes a pipe", pipe, "edited", "edited", changed, []string{"edited", "OLD"}},
		{"its folder becomes a file", file, "tofile/a", "tofile", changed, []string{"tofile", "tofile/a", "tofile/b", "tofile/b/c", "OLD", "OLD2"}},
		{"old removed", remove, "edited", "OLD", lost, []string{"edited"}},
		{"old becomes a pipe", pipe, "edited", "OLD", lost, []string{"edited", "OLD"}},
		{"old becomes a folder", full, "edited", "OLD", lost, []string{"edited", "OLD"}},
		{"of a deletion: old removed", remove, "gone", "OLD", lost, []string{"gone"}},
		{"of a deletion: old becomes a pipe", pipe, "gone", "OLD", lost, []string{"gone", "OLD"}},
		{"of a deletion: old becomes a folder", full, "gone", "OLD", lost, []string{"gone", "OLD"}},
	} {
		t.Run(c.what, func(t *testing.T) {
			r := busy(t)
			before := state(t, r.host, false)
			r.killed("journal " + done)
			named := strings.NewReplacer("OLD2", r.second("tofile/b/c"), "OLD", r.second(c.path))
			c.do(r, named.Replace(c.name))
			touched := state(t, r.host, false)
			write(t, filepath.Dir(r.patch), "patch", "")
			must(t, r.apply(Options{}))
			said := strings.Join(r.result.Notes, "\n")
			if !strings.Contains(said, named.Replace(c.path+c.note)) || !strings.HasSuffix(said, "an earlier apply did not come to its end; the rest of it is taken back") {
				t.Errorf("said %q", said)
			}
			var stay []string
			for _, name := range c.stays {
				stay = append(stay, named.Replace(name))
			}
			now := state(t, r.host, false)
			equal(t, "the rest", without(now, stay), without(before, stay))
			equal(t, "what was touched", only(now, stay), only(touched, stay))
			r.noFolder("recovered")
		})
	}
}

// second is the second name of a file, as the journal has it.
func (r *repo) second(path string) string {
	r.t.Helper()
	s := session{dir: filepath.Join(r.host, ".git/banger-apply")}
	j, err := s.load("journal")
	must(r.t, err)
	for _, step := range j.Steps {
		if string(step.Path) == path {
			return string(step.Old)
		}
	}
	r.t.Fatalf("%s is not in the journal", path)
	return ""
}

// only keeps the lines of a state that are about these names, or what is below them.
func only(state string, names []string) string {
	var b strings.Builder
	for line := range strings.Lines(state) {
		if about(line, names) {
			b.WriteString(line)
		}
	}
	return b.String()
}

func without(state string, names []string) string {
	var b strings.Builder
	for line := range strings.Lines(state) {
		if !about(line, names) && !strings.HasPrefix(line, `"." `) {
			b.WriteString(line)
		}
	}
	return b.String()
}

func about(line string, names []string) bool {
	return slices.ContainsFunc(names, func(name string) bool {
		return strings.HasPrefix(line, strconv.Quote(name)+" ") || strings.HasPrefix(line, strings.TrimSuffix(strconv.Quote(name), `"`)+"/")
	})
}

// While it is taken back the journal does not say done, though it did so when that could
// not be brought to the disk.
func TestKilledTakingBack(t *testing.T) {
	r := busy(t)
	before := state(t, r.host, false)
	if at := r.killed("take back edited,sync done"); at != "take back edited" {
		t.Fatalf("killed at %q", at)
	}
	must(t, r.apply(Options{Check: true}))
	equal(t, "after the next", state(t, r.host, false), before)
	r.noFolder("after the next")
}

// A file that changes between the check and the move is not overwritten.
func TestChangedMeanwhile(t *testing.T) {
	r := busy(t)
	err := r.apply(Options{before: func(step string) error {
		if step == "journal "+moving {
			write(t, r.host, "edited", "edited meanwhile\n")
		}
		return nil
	}})
	fails(t, err, api.Busy, "edited changes meanwhile")
	if strings.Contains(state(t, r.host, false), ".banger-apply") {
		t.Error("files are left")
	}
}

// Nor is one that takes the place of an empty folder.
func TestFolderChangedMeanwhile(t *testing.T) {
	r := newRepo(t, map[string]string{"a": "a\n"})
	write(t, r.guest, "new", "inside\n")
	r.diff()
	must(t, os.Mkdir(filepath.Join(r.host, "new"), 0o755))
	err := r.apply(Options{before: func(step string) error {
		if step == "journal "+moving {
			must(t, os.Remove(filepath.Join(r.host, "new")))
			write(t, r.host, "new", "mine\n")
		}
		return nil
	}})
	fails(t, err, api.Busy, "new changes meanwhile")
	if data, _ := os.ReadFile(filepath.Join(r.host, "new")); string(data) != "mine\n" {
		t.Errorf("new is %q", data)
	}
}

// failing are options with which these steps fail, each when it comes again after it was
// let through so many times.
func failing(err error, steps map[string]int) Options {
	return Options{before: func(step string) error {
		n, bad := steps[step]
		if !bad {
			return nil
		}
		if steps[step] = n - 1; n > 0 {
			return nil
		}
		return err
	}}
}

// What cannot be taken back is said, also to who interrupted it, and is taken back by the
// next apply. The rest is taken back at once.
func TestNotTakenBack(t *testing.T) {
	r := busy(t)
	before := state(t, r.host, false)
	bad := failing(unix.EIO, map[string]int{"take back edited": 0, "take back link": 0})
	err := r.apply(Options{before: func(step string) error {
		if step == "rename todir/deep/file" {
			return context.Canceled
		}
		return bad.before(step)
	}})
	if fails(t, err, api.Internal, "cannot take back edited, link: input/output error"); errors.Is(err, context.Canceled) {
		t.Error("it only says that it was interrupted")
	}
	r.came(Result{})
	stay := []string{"edited", "link", r.second("edited")}
	equal(t, "the rest", without(state(t, r.host, false), stay), without(before, stay))
	err = r.apply(failing(unix.EIO, map[string]int{"take back edited": 0}))
	fails(t, err, api.Internal, "an earlier apply did not come to its end; cannot take back edited: input/output error")
	must(t, r.apply(Options{Check: true}))
	equal(t, "after the next", state(t, r.host, false), before)
	r.noFolder("after the next")
}

// Nothing is taken back before the disk holds that it is not done.
func TestNotReopened(t *testing.T) {
	r := busy(t)
	before := state(t, r.host, false)
	err := r.apply(failing(unix.EIO, map[string]int{"sync done": 0, "sync moving": 1}))
	fails(t, err, api.Internal, "cannot take it back: input/output error")
	now := state(t, r.host, false)
	for line := range strings.Lines(state(t, r.guest, false)) {
		if !strings.Contains(now, line) {
			t.Errorf("is not in place: %s", line)
		}
	}
	must(t, r.apply(Options{Check: true}))
	equal(t, "after the next", state(t, r.host, false), before)
	r.noFolder("after the next")
}

// When the disk fails, what is said is how the working tree is.
func TestSyncFails(t *testing.T) {
	r := busy(t)
	before := state(t, r.host, false)
	once := true
	err := r.apply(Options{before: func(step string) error {
		if step == "sync "+r.host && once {
			once = false
			return unix.EIO
		}
		return nil
	}})
	if err == nil || err.Error() != "cannot apply: input/output error" {
		t.Errorf("all was taken back, and it says %v", err)
	}
	equal(t, "after once", state(t, r.host, false), before)
	r.noFolder("after once")

	const back = "it is taken back, but that may not be on the disk: input/output error"
	bad := failing(unix.EIO, map[string]int{"sync " + r.host: 0})
	fails(t, r.apply(bad), api.Internal, "cannot apply: input/output error; "+back)
	equal(t, "after twice", state(t, r.host, false), before)
	fails(t, r.apply(bad), api.Internal, "cannot apply: an earlier apply did not come to its end; "+back)
	must(t, r.apply(Options{}))
	r.came(Result{Files: 14, Notes: []string{"an earlier apply did not come to its end; it is taken back"}})
	equal(t, "at last", state(t, r.host, false), state(t, r.guest, false))
	r.noFolder("at last")
}

// What could not be removed is remembered also when the next apply has something to do, and
// cannot clear up either.
func TestLeftOverTwice(t *testing.T) {
	r := busy(t)
	var olds []string
	clearFails := Options{before: func(step string) error {
		if name, ok := strings.CutPrefix(step, "clear "); ok {
			olds = append(olds, name)
			return unix.EIO
		}
		return nil
	}}
	must(t, r.apply(clearFails))
	r.git(r.guest, "commit", "-q", "-m", "first")
	write(t, r.guest, "untouched", "second\n")
	r.diff()
	first := len(olds)
	must(t, r.apply(clearFails))
	slices.Sort(olds)
	if olds = slices.Compact(olds); len(olds) != first+1 {
		t.Fatalf("%d second names after %d", len(olds), first)
	}
	for _, name := range olds {
		if _, err := os.Lstat(filepath.Join(r.host, name)); err != nil {
			t.Error(err)
		}
	}
	must(t, r.apply(Options{}))
	r.came(Result{Present: true, Notes: []string{"an earlier apply did not come to its end; all its changes are in place"}})
	equal(t, "at last", state(t, r.host, false), state(t, r.guest, false))
	r.noFolder("at last")
}

// What is in the way of clearing up is named, and is no failure: neither of that apply nor
// of the next.
func TestLeftOver(t *testing.T) {
	r := busy(t)
	var old string
	must(t, r.apply(Options{before: func(step string) error {
		if step == "journal "+done {
			found, err := filepath.Glob(filepath.Join(r.host, ".banger-apply-*.old"))
			must(t, err)
			old = found[0]
			must(t, os.Remove(old))
			write(t, old, "mine", "x")
		}
		return nil
	}}))
	why := "cannot remove " + filepath.Base(old) + ": directory not empty"
	r.came(Result{Files: 14, Notes: []string{why + "; the next apply tries again"}})
	must(t, r.apply(Options{}))
	r.came(Result{Present: true, Notes: []string{"an earlier apply did not come to its end; all its changes are in place", why}})
	must(t, os.Remove(filepath.Join(old, "mine")))
	must(t, r.apply(Options{}))
	equal(t, "working tree", state(t, r.host, false), state(t, r.guest, false))
	r.noFolder("at last")
}

// mounted mounts a file system for the time of the test.
func mounted(t *testing.T, dir string, args ...string) {
	t.Helper()
	must(t, os.Mkdir(dir, 0o755))
	out, err := exec.Command("mount", append(args, dir)...).CombinedOutput()
	if err != nil {
		t.Fatalf("mount %q: %v: %s", args, err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("the test's file system stays mounted: %v", err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
}

// When the journal says done, a power loss takes nothing away, and when it is gone after
// an error, brings nothing back. The git directory is on another disk, or writing the
// journal would bring the working tree to its own. What is on a disk is what lies in the
// image of it.
func TestPowerLoss(t *testing.T) {
	need.Need(t, "root")
	made := busy(t)
	made.git(made.host, "init", "-q", "--separate-git-dir", filepath.Join(t.TempDir(), "git"))
	before, after := state(t, made.host, false), state(t, made.guest, false)
	dir := t.TempDir()
	disk, done, undone := filepath.Join(dir, "disk"), filepath.Join(dir, "done"), filepath.Join(dir, "undone")
	must(t, os.WriteFile(disk, nil, 0o600))
	must(t, os.Truncate(disk, 64<<20))
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", disk).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	// Else the kernel writes by itself every 5 s, see ext4(5).
	mounted(t, filepath.Join(dir, "now"), "-o", "loop,commit=300", disk)
	r := made.copied(t, filepath.Join(dir, "now"))
	must(t, exec.Command("sync", "-f", r.host).Run())
	err := r.apply(Options{before: func(step string) error {
		if step != "journal done" {
			return nil
		}
		must(t, exec.Command("cp", "--", disk, done).Run())
		return unix.ENOSPC
	}})
	fails(t, err, api.NoSpace)
	must(t, exec.Command("cp", "--", disk, undone).Run())

	then := func(image string) string {
		at := filepath.Join(dir, "of-"+filepath.Base(image))
		mounted(t, at, "-o", "loop", image)
		return state(t, filepath.Join(at, "host"), false)
	}
	var lines []string
	for line := range strings.Lines(then(done)) {
		if !strings.Contains(line, ".banger-apply-") && !strings.HasPrefix(line, `"dir"`) { // what clear removes
			lines = append(lines, line)
		}
	}
	equal(t, "done", strings.Join(lines, ""), after)
	equal(t, "undone", then(undone), before)
}

func TestFullDisk(t *testing.T) {
	need.Need(t, "root")
	r := newRepo(t, map[string]string{"a": "a\n", "big": "big\n"})
	write(t, r.guest, "a", "b\n")
	write(t, r.guest, "big", strings.Repeat("0123456789abcdef", 1<<16))
	r.diff()
	small := filepath.Join(t.TempDir(), "small")
	mounted(t, small, "-t", "tmpfs", "-o", "size=1500k", "tmpfs")
	r = r.copied(t, small)
	before := state(t, r.host, false)
	fails(t, r.apply(Options{}), api.NoSpace)
	equal(t, "working tree", state(t, r.host, false), before)
	must(t, unix.Mount("tmpfs", small, "tmpfs", unix.MS_REMOUNT, "size=20m"))
	must(t, r.apply(Options{}))
	equal(t, "working tree", state(t, r.host, false), state(t, r.guest, false))
}

// endsAt is a context that ends when it has been asked n times.
type endsAt struct {
	context.Context
	n int
}

func (c *endsAt) Err() error {
	if c.n--; c.n < 0 {
		return context.Canceled
	}
	return nil
}

// An interrupt is an interrupt whatever it ends: never a refusal.
func TestInterrupted(t *testing.T) {
	for _, o := range []Options{{}, {Branch: "new"}} {
		r := busy(t)
		o.Head, o.Message = r.head, "x"
		before := state(t, r.host, false)
		var err error
		n := 0
		for ; n < 200; n++ {
			f, openErr := os.Open(r.patch)
			must(t, openErr)
			_, err = Patch(&endsAt{context.Background(), n}, r.host, f, o)
			must(t, f.Close())
			if err == nil {
				break
			}
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%+v: asked %d times: %v", o, n, err)
			}
			equal(t, "working tree", state(t, r.host, false), before)
			r.noFolder("interrupted")
		}
		if err != nil || n < 5 {
			t.Errorf("%+v: asked %d times: %v", o, n, err)
		}
	}
}
