package workspace

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"banger/api"
	"banger/internal/guest/wire"
)

// guestRepo is the repository inside: all that is done there goes through it, with
// git and a few POSIX tools. A later one can do the same without git in the guest.
//
// Two git directories share the working tree: .git, the guest's own, and .git/banger,
// ours, which has no conversions, an index of its own and throw-away objects. What
// must last is written into the objects of .git and hangs on refs/banger.
type guestRepo struct {
	guest
	top    string
	format format
}

const (
	refBase = "refs/banger/base"
	refNext = "refs/banger/next"
	refHead = "refs/banger/head"
	refHost = "refs/banger/host"
	// detachedBranch stands in .git/banger/HEAD for a host without a branch.
	detachedBranch = "refs/banger/detached"
)

func (r guestRepo) own(name string) string     { return path.Join(r.top, ".git", name) }
func (r guestRepo) private(name string) string { return path.Join(r.top, ".git/banger", name) }

// Names below .git/banger. work is thrown away after each job, and by the next one.
const (
	cacheIndex  = "index" // what is known of the files on the disk; never the truth
	work        = "work"
	workObjects = "work/objects"
	workIndex   = "work/index"  // guest
	workTarget  = "work/target" // guest and what the host brings
	workBase    = "work/base"
)

// refLockTimeout is how long a git inside waits for one that holds the lock of a ref, in
// ms: longer than one of a dead daemon may take to finish, see wire.Exec.
const refLockTimeout = "6000"

// common is the environment of every git inside: no configuration of the guest's user
// or system, no hooks, no locks that are not needed.
func (r guestRepo) common(extra ...string) []string {
	return append(extra, append(configEnv("core.hooksPath", "/dev/null", "core.fsmonitor", "false", "core.quotePath", "false",
		"core.splitIndex", "false", "core.filesRefLockTimeout", refLockTimeout, "gc.auto", "0", "maintenance.auto", "false"),
		"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_ATTR_NOSYSTEM=1", "GIT_OPTIONAL_LOCKS=0",
		"GIT_TERMINAL_PROMPT=0", "GIT_NO_LAZY_FETCH=1", "GIT_ALLOW_PROTOCOL=none", "GIT_NO_REPLACE_OBJECTS=1", "LC_ALL=C",
		"GIT_CONFIG_PARAMETERS=", "GIT_DIFF_OPTS=", "GIT_LITERAL_PATHSPECS=1")...)
}

// ownEnv is git on the guest's own repository.
func (r guestRepo) ownEnv(extra ...string) []string {
	return r.common(append(extra, "GIT_DIR="+r.own(""), "GIT_WORK_TREE="+r.top)...)
}

// privateEnv is git without conversions, on the index that is named. New objects are
// thrown away with the work folder.
func (r guestRepo) privateEnv(index string, extra ...string) []string {
	return r.common(append(extra, "GIT_DIR="+r.private(""), "GIT_WORK_TREE="+r.top, "GIT_INDEX_FILE="+r.private(index),
		"GIT_OBJECT_DIRECTORY="+r.private(workObjects), "GIT_ALTERNATE_OBJECT_DIRECTORIES="+configQuote(r.own("objects")))...)
}

// lastingEnv is privateEnv with new objects in the guest's repository.
func (r guestRepo) lastingEnv(index string) []string {
	return r.common("GIT_DIR="+r.private(""), "GIT_WORK_TREE="+r.top, "GIT_INDEX_FILE="+r.private(index),
		"GIT_OBJECT_DIRECTORY="+r.own("objects"))
}

func (r guestRepo) git(ctx context.Context, env []string, in io.Reader, args ...string) (string, error) {
	out, err := r.run(ctx, command{argv: append([]string{"git"}, args...), env: env, dir: r.top, in: in, slow: true})
	return strings.TrimSuffix(string(out), "\n"), r.orFull(ctx, err)
}

// gitToEnd is git for short commands that take the locks of refs and of the guest's
// index: a git that is ended in the moment of making a lock leaves it, and whoever comes
// next is refused.
func (r guestRepo) gitToEnd(ctx context.Context, env []string, in io.Reader, args ...string) error {
	_, err := r.run(ctx, command{argv: append([]string{"git"}, args...), env: env, dir: r.top, in: in, slow: true, finish: true})
	return r.orFull(ctx, err)
}

// orFull is err of a git, or that the disk is full: git does not always say so.
func (r guestRepo) orFull(ctx context.Context, err error) error {
	var failed *guestError
	if errors.As(err, &failed) && api.CodeOf(err) == api.Internal && strings.Contains(failed.stderr, "unable to write") && r.isFull(ctx) {
		return r.fullError(err)
	}
	return err
}

// isFull tells whether a file of any size fits no more.
func (r guestRepo) isFull(ctx context.Context) bool {
	out, err := r.run(ctx, command{argv: []string{"stat", "-f", "-c", "%a %S %d", r.top}, dir: r.top})
	var blocks, size, inodes int64
	if _, scanErr := fmt.Sscan(string(out), &blocks, &size, &inodes); err != nil || scanErr != nil {
		return false
	}
	return blocks*size < 1<<20 || inodes == 0
}

// create makes the two git directories. Ours comes first: a folder that has it is
// known as ours, however little else is there.
func (r guestRepo) create(ctx context.Context, repo Repo, exclude []byte) error {
	var buf bytes.Buffer
	t := tar.NewWriter(&buf)
	dir := func(name string) {
		t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755})
	}
	file := func(name string, text []byte) {
		t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(text))})
		t.Write(text)
	}
	dir(".git")
	for _, d := range []string{"", "refs", "info", "objects"} {
		dir(path.Join(".git/banger", d))
	}
	file(".git/banger/config", rawConfig(r.format, "excludesFile", r.own("info/exclude")))
	file(".git/banger/info/attributes", []byte(rawAttributes))
	file(".git/banger/HEAD", []byte("ref: "+detachedBranch+"\n"))
	for _, d := range []string{"objects", "objects/info", "objects/pack", "refs", "refs/heads", "refs/tags", "info"} {
		dir(path.Join(".git", d))
	}
	file(".git/info/exclude", exclude)
	file(".git/config", guestConfig(repo))
	file(".git/HEAD", []byte("ref: refs/heads/main\n"))
	if err := t.Close(); err != nil {
		return err
	}
	return r.untar(ctx, r.top, buf.Bytes())
}

// guestConfig is the configuration of the guest's own repository: who the user is,
// where the repository came from, and what decides on the bytes of a checkout.
func guestConfig(repo Repo) []byte {
	var b bytes.Buffer
	promisor := repo.promisor()
	version := 0
	if repo.format == "sha256" || promisor != "" {
		version = 1
	}
	fmt.Fprintf(&b, "[core]\n\trepositoryformatversion = %d\n\tfilemode = true\n\tbare = false\n\tlogallrefupdates = true\n", version)
	set := func(section, key, value string) {
		if value = strings.ToValidUTF8(value, "?"); value != "" {
			fmt.Fprintf(&b, "[%s]\n\t%s = %s\n", section, key, configQuote(value))
		}
	}
	if repo.format == "sha256" {
		set("extensions", "objectformat", "sha256")
	}
	set("core", "autocrlf", repo.config["core.autocrlf"])
	set("core", "eol", repo.config["core.eol"])
	set("user", "name", repo.config["user.name"])
	set("user", "email", repo.config["user.email"])
	remotes := []string{"origin"}
	if promisor != "" && promisor != "origin" {
		remotes = append(remotes, promisor)
	}
	for _, name := range remotes {
		section := "remote " + configQuote(name)
		if url := repo.origin(name); url != "" {
			set(section, "url", url)
			set(section, "fetch", "+refs/heads/*:refs/remotes/"+name+"/*")
		}
		if name == promisor {
			set(section, "promisor", "true")
			set(section, "partialclonefilter", repo.config["remote."+name+".partialclonefilter"])
		}
	}
	return b.Bytes()
}

// odd is the error for an answer of git that is none.
func (r guestRepo) odd(verb, said string) error {
	return api.Errorf(api.Refused, "git %s in the guest said %q", verb, wire.CleanText(said, maxShown)).WithHint("banger exec %s git -C %s fsck", r.name, visible(r.top))
}

// there tells whether the folder still has our git directory.
func (r guestRepo) there(ctx context.Context) (bool, error) {
	_, ok, err := r.ask(ctx, command{argv: []string{"test", "-d", r.private("")}, dir: "/"})
	return ok, err
}

// refs are all refs inside, by name.
func (r guestRepo) refs(ctx context.Context) (map[string]string, error) {
	out, err := r.git(ctx, r.ownEnv(), nil, "for-each-ref", "--format=%(objectname) %(refname)")
	if err != nil {
		return nil, err
	}
	refs := map[string]string{}
	for line := range strings.SplitSeq(out, "\n") {
		if oid, name, ok := strings.Cut(line, " "); ok && isOID(oid) {
			refs[name] = oid
		}
	}
	return refs, nil
}

// tree lists a tree; "" is the empty one.
func (r guestRepo) tree(ctx context.Context, oid string) (files, error) {
	if oid == "" {
		return files{}, nil
	}
	out, err := r.git(ctx, r.ownEnv(), nil, "ls-tree", "-z", "-r", "--full-tree", oid)
	if err != nil {
		return nil, err
	}
	list := files{}
	return list, eachTreeItem([]byte(out), func(path, _ string, e entry) { list[path] = e })
}

// begin makes an empty work folder: one that is left would have locks in it. So may our
// refs, when the guest lost its power.
func (r guestRepo) begin(ctx context.Context) error {
	argv := []string{"rm", "-rf", "--", r.private(work), r.private("HEAD.lock")}
	for _, ref := range []string{refBase, refNext, refHead, refHost} {
		argv = append(argv, r.own(ref+".lock"))
	}
	// A git add of 100,000 files leaves as many objects there.
	_, err := r.run(ctx, command{argv: argv, dir: r.top, slow: true})
	if err != nil {
		return err
	}
	_, err = r.run(ctx, command{argv: []string{"mkdir", "-p", "--", r.private(workObjects)}, dir: r.top})
	return err
}

// end throws the work folder away. It also works when the job was cancelled.
func (r guestRepo) end(ctx context.Context) {
	// What is left is thrown away by the next job, so a guest that does not answer is not
	// waited for: stop and rm wait for this.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
	defer cancel()
	_, _ = r.run(ctx, command{argv: []string{"rm", "-rf", "--", r.private(work)}, dir: r.top})
}

// scan looks at the working tree and returns what differs from base, the name of a
// tree. work/index has the working tree then. What cannot be read is in
// without, and is as in base.
func (r guestRepo) scan(ctx context.Context, base string) (changes files, without unread, err error) {
	base = r.orEmpty(base)
	// The index that is kept saves the reading of files that did not change; base alone
	// decides what is in it afterwards.
	_, err = r.git(ctx, r.privateEnv(cacheIndex), nil, "read-tree", "--index-output="+r.private(workIndex), "-i", "-m", base)
	var failed *guestError
	if errors.As(err, &failed) && api.CodeOf(err) == api.Internal {
		if _, err := r.run(ctx, command{argv: []string{"rm", "-f", "--", r.private(cacheIndex), r.private(cacheIndex + ".lock")}, dir: r.top}); err != nil {
			return nil, without, err
		}
		_, err = r.git(ctx, r.privateEnv(workIndex), nil, "read-tree", base)
	}
	if err != nil {
		return nil, without, err
	}
	if without, err = r.addAll(ctx); err != nil {
		return nil, without, err
	}
	// Files that the guest committed, or is about to, although they are ignored.
	forced, err := r.git(ctx, r.ownEnv(), nil, "ls-files", "-z", "-c", "-i", "--exclude-standard")
	if err != nil {
		return nil, without, err
	}
	if readable := slices.DeleteFunc(splitZ([]byte(forced)), without.has); len(readable) > 0 {
		in := strings.NewReader(strings.Join(readable, "\x00") + "\x00")
		if _, err := r.git(ctx, r.privateEnv(workIndex), in, "update-index", "-z", "--add", "--remove", "--replace", "--stdin"); err != nil {
			return nil, without, err
		}
	}
	changes, _, err = r.diff(ctx, base)
	return changes, without, err
}

func (r guestRepo) orEmpty(tree string) string {
	if tree == "" {
		return r.format.emptyTree()
	}
	return tree
}

// diff lists what work/index has other than tree; a zero entry is a deletion. n counts
// those that are no repositories inside the repository.
func (r guestRepo) diff(ctx context.Context, tree string) (changes files, n int, err error) {
	out, err := r.git(ctx, r.privateEnv(workIndex), nil, "diff-index", "--cached", "--raw", "-z", "--no-renames", "--no-abbrev",
		"--ignore-submodules=none", r.orEmpty(tree))
	if err != nil {
		return nil, 0, err
	}
	changes = files{}
	items := splitZ([]byte(out))
	for i := 0; i+1 < len(items); i += 2 {
		// ":100644 100755 OID OID M" PATH
		f := strings.Fields(items[i])
		if len(f) != 5 || !isOID(f[3]) {
			return nil, 0, r.odd("diff-index", items[i])
		}
		e := entry{f[1], f[3]}
		if f[4] == "D" {
			e = entry{}
		}
		changes[items[i+1]] = e
		if f[0] != ":"+modeGitlink && f[1] != modeGitlink {
			n++
		}
	}
	return changes, n, nil
}

// patch writes the difference from tree to work/index, in a form that depends on no
// configuration. Renames are a deletion and an addition: they apply to a host that
// changed the file meanwhile in no other way, and cost no search.
func (r guestRepo) patch(ctx context.Context, tree string, w io.Writer) error {
	_, err := r.run(ctx, command{env: r.privateEnv(workIndex), dir: r.top, out: w, slow: true, argv: []string{
		"git", "diff-index", "--cached", "--patch", "--binary", "--full-index", "--no-renames", "--no-color", "--no-ext-diff", "--no-textconv",
		"--ignore-submodules=all", "--src-prefix=a/", "--dst-prefix=b/", "--unified=3", "--diff-algorithm=myers", r.orEmpty(tree)}})
	return err
}

// ignored lists what git ignores in the working tree: files, and folders as "name/".
func (r guestRepo) ignored(ctx context.Context) ([]string, error) {
	out, err := r.git(ctx, r.privateEnv(workIndex), nil, "ls-files", "-z", "-o", "-i", "--exclude-standard", "--directory")
	return splitZ([]byte(out)), err
}

// derive writes the tree from with changes made to it, through the index of env.
func (r guestRepo) derive(ctx context.Context, env []string, from string, changes files) (string, error) {
	if _, err := r.git(ctx, env, nil, "read-tree", r.orEmpty(from)); err != nil {
		return "", err
	}
	var removals, additions bytes.Buffer
	for _, p := range slices.Sorted(maps.Keys(changes)) {
		if e := changes[p]; e != (entry{}) {
			fmt.Fprintf(&additions, "%s %s\t%s\x00", e.mode, e.oid, p)
		} else {
			fmt.Fprintf(&removals, "0 %s\t%s\x00", strings.Repeat("0", len(r.format.emptyTree())), p)
		}
	}
	removals.Write(additions.Bytes())
	if removals.Len() > 0 {
		if _, err := r.git(ctx, env, &removals, "update-index", "-z", "--index-info"); err != nil {
			return "", err
		}
	}
	return r.writeTree(ctx, env)
}

func (r guestRepo) writeTree(ctx context.Context, env []string) (string, error) {
	oid, err := r.git(ctx, env, nil, "write-tree")
	if err == nil && !isOID(oid) {
		err = r.odd("write-tree", oid)
	}
	return oid, err
}

// checkOut writes changes into the working tree, which work/index describes. It
// refuses to touch a file that was changed since. A file that git cannot remove is an
// error too, though git only warns of it.
func (r guestRepo) checkOut(ctx context.Context, changes files) error {
	if len(changes) == 0 {
		return nil
	}
	guestTree, err := r.writeTree(ctx, r.privateEnv(workIndex))
	if err != nil {
		return err
	}
	target, err := r.derive(ctx, r.privateEnv(workTarget), guestTree, changes)
	if err != nil {
		return err
	}
	argv := []string{"git", "read-tree", "-m", "-u", guestTree, target}
	said := &bounded{limit: maxSaid, drop: true}
	_, err = r.run(ctx, command{argv: argv, env: r.privateEnv(workIndex), dir: r.top, errs: said, slow: true})
	if err == nil && strings.Contains(said.String(), "unable to unlink") {
		err = &guestError{argv: argv, stderr: said.String()}
	}
	return r.orFull(ctx, err)
}

// sync waits until what was written is on the disk. git does that for objects and refs,
// not for files: a base that lasts and files that do not would look as if the guest had
// emptied them.
func (r guestRepo) sync(ctx context.Context) error {
	_, err := r.run(ctx, command{argv: []string{"sync", "-f", r.top}, dir: r.top, slow: true})
	var failed *guestError
	if errors.As(err, &failed) { // one that knows no -f
		_, err = r.run(ctx, command{argv: []string{"sync"}, dir: r.top, slow: true})
	}
	return err
}

// keepIndex makes work/index the index that the next scan starts from.
func (r guestRepo) keepIndex(ctx context.Context) error {
	_, err := r.run(ctx, command{argv: []string{"mv", "-f", "--", r.private(workIndex), r.private(cacheIndex)}, dir: r.top})
	return err
}

// setRefs changes refs of the guest's repository, all or none. An empty value deletes.
func (r guestRepo) setRefs(ctx context.Context, refs map[string]string) error {
	if len(refs) == 0 {
		return nil
	}
	var in bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(refs)) {
		switch oid := refs[name]; {
		case name == "HEAD": // detached
			fmt.Fprintf(&in, "option no-deref\x00update HEAD\x00%s\x00\x00", oid)
		case oid == "":
			fmt.Fprintf(&in, "delete %s\x00\x00", name)
		default:
			fmt.Fprintf(&in, "update %s\x00%s\x00\x00", name, oid)
		}
	}
	return r.gitToEnd(ctx, r.ownEnv(), &in, "update-ref", "-z", "--stdin")
}

// receive takes a pack. Nothing uses its objects before a ref names them. It comes into
// the work folder first: of one that breaks off git leaves the part that came.
func (r guestRepo) receive(ctx context.Context, pack io.Reader, partial bool) error {
	args := []string{"index-pack", "--stdin", "--fix-thin"}
	kinds := []string{".pack", ".idx"} // in this order: with its index a pack counts
	if partial {
		args = append(args, "--promisor")
		kinds = []string{".pack", ".promisor", ".idx"}
	}
	said, err := r.git(ctx, r.privateEnv(workIndex), pack, args...)
	if err != nil {
		return err
	}
	oid, ok := strings.CutPrefix(said, "pack\t")
	if !ok || !isOID(oid) {
		return r.odd("index-pack", said)
	}
	argv := []string{"mv", "-f", "--"}
	for _, kind := range kinds {
		argv = append(argv, "pack-"+oid+kind)
	}
	_, err = r.run(ctx, command{argv: append(argv, r.own("objects/pack")), dir: path.Join(r.private(workObjects), "pack")})
	return err
}

// addShallow adds to the commits where the history ends.
func (r guestRepo) addShallow(ctx context.Context, more []byte) error {
	was, err := r.run(ctx, command{argv: []string{"cat", "--", r.own("shallow")}, dir: r.top})
	var failed *guestError
	if err != nil && !errors.As(err, &failed) {
		return err
	}
	lines := strings.Fields(string(was) + "\n" + string(more))
	slices.Sort(lines)
	text := strings.Join(slices.Compact(lines), "\n") + "\n"
	var buf bytes.Buffer
	t := tar.NewWriter(&buf)
	t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "shallow", Mode: 0o644, Size: int64(len(text))})
	t.Write([]byte(text))
	if err := t.Close(); err != nil {
		return err
	}
	return r.untar(ctx, r.own(""), buf.Bytes())
}
