package workspace

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"banger/api"
	"banger/internal/daemon/hostcmd"
	"banger/internal/daemon/opstate"
	"banger/internal/daemon/store"
)

// Prepared is what a prepare did.
type Prepared struct {
	Workspace store.Workspace
	HeadShort string // empty without commits
	// Changed counts files that differ from Head as they came in, SkippedUntracked
	// untracked ones that stayed on the host.
	Changed, SkippedUntracked int
	// Updated counts files that were written or removed inside. Kept names those that
	// changed on both sides and were left as they are inside, fit for a terminal; those
	// that cannot be written there have a note.
	Updated int
	Kept    []string
	// Notes are lines for the user.
	Notes []string
}

// mergeTries bounds how often a prepare tries because files changed inside meanwhile.
const mergeTries = 5

// stuckRounds bounds how many things in the way of git are found one at a time.
const stuckRounds = 100

// Prepare brings the repository that path lies in into a running VM, the first time
// and every other time. Ended at any moment, by ctx, Interrupt, SIGKILL or a full
// disk, it leaves the base as it was or as it was to become, and no file that is half
// written; the next one goes on from there.
func (m *Manager) Prepare(ctx context.Context, vmID, path string, includeUntracked bool, p opstate.Progress) (Prepared, error) {
	p.Step(1, 3, "read")
	repo, err := m.Locate(ctx, path)
	if err != nil {
		return Prepared{}, err
	}
	ctx, vm, leave, err := m.enter(ctx, vmID)
	if err != nil {
		return Prepared{}, err
	}
	defer leave()
	j := &preparation{m: m, vm: vm, repo: repo, progress: p, stuck: map[string]bool{}}
	err = j.run(ctx, includeUntracked)
	err = because(ctx, m.guest(vm).blame(err, j.inside.top))
	return j.result, explain(err, "cannot bring %s into %s", visible(repo.Path), vm.Name)
}

// preparation is one Prepare.
type preparation struct {
	m        *Manager
	vm       store.VM
	repo     Repo
	progress opstate.Progress
	shadow   *shadow
	inside   guestRepo
	result   Prepared

	refs map[string]string // inside, at the beginning
	next files             // what an interrupted prepare was to bring in
	came files             // what of it had come in
	base files             // with that

	stuck map[string]bool // files that cannot be written inside, as far as it was tried

	// of the last scan
	without unread
	notes   []string
	snap    snapshot
}

func (j *preparation) run(ctx context.Context, includeUntracked bool) (err error) {
	if j.shadow, err = j.m.openShadow(ctx, j.repo); err != nil {
		return err
	}
	defer j.shadow.close()
	// What cannot come in leaves no trace inside.
	index, err := j.shadow.tracked(ctx)
	if err != nil {
		return err
	}
	if err := j.open(ctx); err != nil {
		return err
	}
	if err := j.inside.begin(ctx); err != nil {
		return err
	}
	defer j.inside.end(ctx)
	guest, err := j.look(ctx)
	if err != nil {
		return err
	}
	if j.snap, err = j.shadow.take(ctx, index, known{base: j.base, guest: guest}, includeUntracked, j.progress); err != nil {
		return err
	}
	j.progress.Step(2, 3, "send")
	tags, err := j.newTags(ctx)
	if err != nil {
		return err
	}
	if err := j.send(ctx, tags); err != nil {
		return err
	}
	j.progress.Step(3, 3, "check out")
	pl, newBase, err := j.bring(ctx, guest)
	if err != nil {
		return err
	}
	return j.finish(ctx, pl, newBase, tags)
}

// open finds the repository inside, or makes it.
func (j *preparation) open(ctx context.Context) error {
	row, ok, err := j.m.recorded(ctx, j.vm.ID)
	if err != nil {
		return err
	}
	if ok && row.HostPath != j.repo.Path {
		return api.Errorf(api.Refused, "%s holds %s", j.vm.Name, visible(row.HostPath)).WithHint("banger up %s", visible(j.repo.Path))
	}
	g := j.m.guest(j.vm)
	dir, note := row.GuestPath, ""
	made := false
	if ok {
		if made, err = (guestRepo{guest: g, top: dir}).there(ctx); err != nil {
			return err
		}
	}
	if !made {
		if dir, note, err = j.m.places.find(ctx, g, j.repo); err != nil {
			return err
		}
		if ok && dir != row.GuestPath {
			note = fmt.Sprintf("%s inside is no repository any more: its files stay there, a fresh copy is at %s", visible(row.GuestPath), visible(dir))
		}
	}
	if note != "" {
		j.result.Notes = append(j.result.Notes, note)
	}
	j.result.Workspace = store.Workspace{VMID: j.vm.ID, HostPath: j.repo.Path, GuestPath: dir, Head: j.repo.Head}
	j.inside = guestRepo{guest: g, top: dir, format: j.repo.format}
	if made {
		if j.refs, err = j.inside.refs(ctx); err != nil {
			return err
		}
		if j.refs[refBase] != "" {
			return nil
		}
	}
	// Not yet, or not to the end.
	exclude, err := j.exclude()
	if err != nil {
		return err
	}
	if err := j.inside.create(ctx, j.repo, exclude); err != nil {
		return err
	}
	j.refs, err = j.inside.refs(ctx)
	return err
}

// exclude is what the host's user ignores beyond the .gitignore files.
func (j *preparation) exclude() ([]byte, error) {
	const most = 1 << 20 // bytes
	var text []byte
	paths := []string{j.repo.ignores}
	own := filepath.Join(j.shadow.dir, "info", "exclude")
	if info, err := os.Lstat(own); err == nil && info.Mode().IsRegular() {
		paths = append(paths, own)
	} else if err == nil { // a link may name any file of the user
		j.result.Notes = append(j.result.Notes, "info/exclude is a symbolic link: what it lists is ignored on the host only")
	}
	for _, path := range paths {
		if info, err := os.Stat(path); err == nil && (!info.Mode().IsRegular() || info.Size() > most) {
			return nil, api.Errorf(api.Refused, "the list of ignored files %s is no plain file, or larger than 1 MiB", visible(path)).
				WithHint("git config --show-origin core.excludesFile")
		}
		more, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		text = append(append(text, more...), '\n')
	}
	return text, nil
}

// look reads the base and the working tree inside.
func (j *preparation) look(ctx context.Context) (guest files, err error) {
	was, err := j.inside.tree(ctx, j.refs[refBase])
	if err != nil {
		return nil, err
	}
	changes, without, err := j.inside.scan(ctx, j.refs[refBase])
	if err != nil {
		return nil, err
	}
	guest = overlay(was, changes)
	j.without, j.notes, j.came, j.next = without, without.notes(j.vm.User.Name), files{}, files{}
	if next := j.refs[refNext]; next != "" {
		if j.next, err = j.inside.tree(ctx, next); err != nil {
			return nil, err
		}
		if j.came, err = j.inside.resume(ctx, was, guest, j.next); err != nil {
			return nil, err
		}
	}
	j.base = overlay(was, j.came)
	return guest, nil
}

// newTags are the tags in the history of HEAD that are not inside: builds ask for them
// with git describe.
func (j *preparation) newTags(ctx context.Context) (map[string]string, error) {
	tags := map[string]string{}
	if j.repo.Head == "" {
		return tags, nil
	}
	out, err := repositoryGit(j.repo.Path).line(ctx, "for-each-ref", "--merged="+j.repo.Head, "--format=%(objectname) %(refname)", "refs/tags")
	if err != nil {
		return nil, err
	}
	for line := range strings.SplitSeq(out, "\n") {
		if oid, name, ok := strings.Cut(line, " "); ok && isOID(oid) && j.refs[name] == "" {
			tags[name] = oid
		}
	}
	return tags, nil
}

// send brings in the objects: the commit with its history, the files as they lie on
// the disk, new tags; as one pack, without what came in with an earlier commit.
func (j *preparation) send(ctx context.Context, tags map[string]string) error {
	partial := j.repo.promisor() != ""
	if partial {
		lacks, err := j.shadow.missing(ctx, j.snap.tree)
		if err != nil {
			return err
		}
		if lacks {
			return api.Errorf(api.Refused, "it is a partial clone that lacks files of this commit").WithHint("git sparse-checkout disable")
		}
	}
	revs := []string{j.snap.tree, j.snap.headTree}
	for _, oid := range tags {
		revs = append(revs, oid)
	}
	if j.repo.Head != "" {
		revs = append(revs, j.repo.Head)
	}
	if old := j.refs[refHost]; j.shadow.has(ctx, old) {
		revs = append(revs, "--not", old)
	}
	args := []string{"git", "pack-objects", "-q", "--revs", "--thin", "--stdout", "--delta-base-offset"}
	if partial {
		args = append(args, "--missing=allow-any")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	pack, err := hostcmd.Start(ctx, hostcmd.Command{Argv: args, Env: j.shadow.git.env, Dir: j.repo.Path,
		Stdin: strings.NewReader(strings.Join(revs, "\n") + "\n")})
	if err != nil {
		return err
	}
	sent := &counter{r: pack.Stdout, progress: j.progress}
	var header [12]byte // "PACK", version, number of objects; gitformat-pack(5)
	_, err = io.ReadFull(sent, header[:])
	if err == nil && binary.BigEndian.Uint32(header[8:]) > 0 {
		if err = j.shallow(ctx); err == nil {
			err = j.inside.receive(ctx, io.MultiReader(bytes.NewReader(header[:]), sent), partial)
		}
	} else if err == nil {
		_, err = io.Copy(io.Discard, sent)
	}
	if err != nil {
		// A pack that ended early failed here, whatever the guest says of it.
		ended := sent.ended.Load()
		if !ended {
			cancel()
		}
		if ours := pack.Wait(); ours != nil && ended {
			return ours
		}
		return err
	}
	return pack.Wait()
}

// shallow tells the guest where the history of a shallow clone ends.
func (j *preparation) shallow(ctx context.Context) error {
	if !j.repo.shallow {
		return nil
	}
	text, err := os.ReadFile(filepath.Join(j.shadow.dir, "shallow"))
	if err != nil {
		return err
	}
	return j.inside.addShallow(ctx, text)
}

// bring merges the host's working tree into the guest's, and returns the new base.
func (j *preparation) bring(ctx context.Context, guest files) (plan, string, error) {
	tries := mergeTries
	// Where git gives up at the first thing in its way, each needs a round of its own.
	for rounds := stuckRounds; ; rounds-- {
		pl, newBase, err := j.bringOnce(ctx, guest)
		var failed *guestError
		if err == nil || !errors.As(err, &failed) || api.CodeOf(err) != api.Internal {
			return pl, newBase, err
		}
		if !slices.Contains(failed.argv, "-u") { // not the checkout
			return pl, newBase, err
		}
		if err = j.inside.begin(ctx); err != nil {
			return pl, newBase, err
		}
		if guest, err = j.look(ctx); err != nil {
			return pl, newBase, err
		}
		stuck, err := j.stick(ctx, pl.write, guest, failed.stderr)
		if err != nil {
			return pl, newBase, err
		}
		if stuck && rounds > 0 {
			continue
		}
		if !strings.Contains(failed.stderr, "not uptodate") && !strings.Contains(failed.stderr, "would be overwritten") {
			return pl, newBase, failed
		}
		if tries--; tries == 0 {
			return pl, newBase, api.Errorf(api.Busy, "files change inside all the time: %w", failed).WithHint("banger up")
		}
	}
}

func (j *preparation) bringOnce(ctx context.Context, guest files) (pl plan, newBase string, err error) {
	blocked := func(string) bool { return false }
	if len(guest) > 0 {
		ignored, err := j.inside.ignored(ctx)
		if err != nil {
			return pl, "", err
		}
		blocked = inTheWay(ignored)
	}
	pl = merge(j.base, guest, j.snap.files, blocked, j.without.has, func(path string) bool { return j.stuck[path] })
	was := j.refs[refBase]
	if newBase, err = j.inside.derive(ctx, j.inside.lastingEnv(workBase), was, lasting(j.came, pl.base, j.next)); err != nil {
		return pl, "", err
	}
	if newBase != was {
		if err := j.inside.setRefs(ctx, map[string]string{refNext: newBase}); err != nil {
			return pl, "", err
		}
		j.refs[refNext] = newBase
	}
	if err := j.inside.checkOut(ctx, pl.write); err != nil || len(pl.write)+len(j.came) == 0 {
		return pl, newBase, err
	}
	return pl, newBase, j.inside.sync(ctx)
}

// finish moves the base, and the guest's branch where that is due.
func (j *preparation) finish(ctx context.Context, pl plan, newBase string, tags map[string]string) error {
	if err := j.inside.keepIndex(ctx); err != nil {
		return err
	}
	head, err := j.headInside(ctx, pl.behind)
	if err != nil {
		return err
	}
	refs := map[string]string{refBase: newBase, refHead: head}
	if j.refs[refNext] != "" {
		refs[refNext] = ""
	}
	if j.repo.Head != "" {
		refs[refHost] = j.repo.Head
	} else if j.refs[refHost] != "" {
		refs[refHost] = ""
	}
	for name, oid := range tags {
		refs[name] = oid
	}
	behind := ""
	if len(pl.stuck) > 0 {
		behind = "files there cannot be written"
		j.notes = append(j.notes, stuckNote(pl.stuck, j.vm.User.Name))
	}
	if len(pl.kept) > 0 {
		behind = "files changed on both sides"
	}
	note, err := j.moveHead(ctx, behind, refs)
	if err != nil {
		return err
	}
	if note != "" {
		j.notes = append(j.notes, note)
	}
	j.result.Notes = append(j.result.Notes, j.notes...)
	now := time.Now()
	w := &j.result.Workspace
	w.BaseTree, w.PreparedAt, w.Changes, w.ChangesAt = newBase, now, pl.changes, now
	j.result.HeadShort, j.result.Changed, j.result.SkippedUntracked = j.repo.HeadShort, j.snap.changed, j.snap.skipped
	j.result.Updated += len(pl.write)
	for _, path := range pl.kept {
		j.result.Kept = append(j.result.Kept, visible(path))
	}
	return j.m.store.PutWorkspace(ctx, *w)
}

// inTheWay tells whether one of the ignored files and folders lies where a path would
// go, above it or below it.
func inTheWay(ignored []string) func(path string) bool {
	names, above := map[string]bool{}, map[string]bool{}
	for _, name := range ignored {
		name = strings.TrimSuffix(name, "/")
		names[name] = true
		for dir := range parents(name) {
			above[dir] = true
		}
	}
	return func(path string) bool {
		if names[path] || above[path] {
			return true
		}
		return slices.ContainsFunc(slices.Collect(parents(path)), func(dir string) bool { return names[dir] })
	}
}

// counter reports what was read as progress.
type counter struct {
	r        io.Reader
	n        int64
	ended    atomic.Bool // it was read to its end
	progress opstate.Progress
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if err == io.EOF {
		c.ended.Store(true)
	}
	c.progress.Bytes(c.n, 0)
	return n, err
}
