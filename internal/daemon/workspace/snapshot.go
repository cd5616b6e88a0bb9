package workspace

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"banger/api"
	"banger/internal/daemon/opstate"
)

// snapshot is the working tree of the host at one moment, as bytes: each file was
// read once, and what was read is what is sent and recorded.
type snapshot struct {
	files files  // host: the tree to merge
	tree  string // what is sent of it, in the shadow
	// headTree is the commit as it lies on the disk: where git converts a file (line
	// ends, LFS) and thinks it unchanged, the bytes on the disk stand for it.
	headTree string
	changed  int // files that differ from headTree
	skipped  int // untracked files that stayed on the host, or did as they are now
}

// known is what the guest has, which decides on untracked files.
type known struct {
	base  files
	guest files
}

const (
	wholeFile = 4 << 20 // bytes: a file up to this size is read into memory at once
	readTries = 5       // for a file that is written to while it is read
)

// take reads the working tree: tracked files; untracked ones when asked, and those
// that are the same inside; of those that came in earlier it is only seen whether they
// are still there, and the same: the base is the guest's word, which must not choose
// what is sent. Ignored files are never read.
func (s *shadow) take(ctx context.Context, index map[string]indexed, k known, includeUntracked bool, p opstate.Progress) (snapshot, error) {
	var snap snapshot
	others, err := s.untracked(ctx)
	if err != nil {
		return snap, err
	}
	head, trees, err := s.tree(ctx, s.repo.Head)
	if err != nil {
		return snap, err
	}
	w, err := openWorkTree(s.repo.Path, s.objects, s.repo.config["core.filemode"] != "false")
	if err != nil {
		return snap, err
	}
	defer w.close()
	w.progress = p
	snap.files = files{}
	if err := w.readTracked(ctx, index, snap.files); err != nil {
		return snap, err
	}
	stale := map[string]bool{} // came in earlier, and are something else now
	for _, path := range others {
		inside, was := k.guest[path], k.base[path]
		if !includeUntracked && inside == (entry{}) && was == (entry{}) {
			continue
		}
		e, err := w.read(ctx, path, entry{})
		if err != nil {
			return snap, err
		}
		if e != (entry{}) && (includeUntracked || e == inside) {
			snap.files[path] = e
		}
		stale[path] = e != (entry{}) && !includeUntracked && e != inside && e != was
	}
	disk, err := s.asOnDisk(ctx, index, head, snap.files)
	if err != nil {
		return snap, err
	}
	for path := range union(disk, snap.files) {
		if disk[path] != snap.files[path] {
			snap.changed++
		}
	}
	if snap.headTree, err = s.objects.putTree(disk, trees); err != nil {
		return snap, err
	}
	if snap.tree, err = s.objects.putTree(snap.files, trees); err != nil {
		return snap, err
	}
	for path, b := range k.base {
		if _, ok := snap.files[path]; !ok && w.exists(path) {
			snap.files[path] = b
		}
	}
	for _, path := range others {
		if snap.files[path] == (entry{}) || stale[path] {
			snap.skipped++
		}
	}
	return snap, nil
}

// asOnDisk is the commit with the bytes on the disk where git converts them.
func (s *shadow) asOnDisk(ctx context.Context, index map[string]indexed, head, disk files) (files, error) {
	var differ []string
	for path, e := range index {
		if d := disk[path]; head[path] == e.entry && d.mode == e.mode && d.oid != e.oid {
			differ = append(differ, path)
		}
	}
	if len(differ) == 0 {
		return head, nil
	}
	dirty, err := s.dirty(ctx)
	if err != nil {
		return nil, err
	}
	converted := files{}
	for _, path := range differ {
		if !dirty[path] {
			converted[path] = disk[path]
		}
	}
	return overlay(head, converted), nil
}

// workTree reads files below a folder, without following any symbolic link: what lies
// behind one is not in the repository.
type workTree struct {
	top       int // descriptor
	objects   objectDir
	modes     bool // the executable bit means something
	progress  opstate.Progress
	bytesRead int64
}

func openWorkTree(top string, objects objectDir, modes bool) (*workTree, error) {
	fd, err := unix.Open(top, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: top, Err: err}
	}
	return &workTree{top: fd, objects: objects, modes: modes}, nil
}

func (w *workTree) close() { unix.Close(w.top) }

func (w *workTree) readTracked(ctx context.Context, index map[string]indexed, out files) error {
	for path, e := range index {
		switch {
		case e.skipped:
			out[path] = e.entry
		case e.mode == modeGitlink:
			// A submodule that is not checked out is an empty folder, or not even that.
			if w.kind(path) == unix.S_IFDIR {
				out[path] = e.entry
			}
		default:
			on, err := w.read(ctx, path, e.entry)
			if err != nil {
				return err
			}
			if (on != entry{}) {
				out[path] = on
			}
		}
	}
	return nil
}

// open opens path with O_PATH or for reading; absent when there is no such file, or a
// symbolic link on the way to it.
func (w *workTree) open(path string, flags uint64) (fd int, absent bool, err error) {
	how := &unix.OpenHow{Flags: flags | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	for range readTries {
		fd, err = unix.Openat2(w.top, path, how)
		// EAGAIN: something was renamed meanwhile, see openat2(2).
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	switch {
	case err == nil:
		return fd, false, nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return -1, true, nil
	case errors.Is(err, unix.EACCES):
		err = api.Errorf(api.Refused, "cannot read %s: %w", visible(path), err).WithHint("ls -l %s", visible(path))
	default:
		err = fmt.Errorf("cannot read %s: %w", visible(path), err)
	}
	return -1, false, err
}

// kind is the file type bits of path, 0 when it is not there.
func (w *workTree) kind(path string) uint32 {
	fd, absent, err := w.open(path, unix.O_PATH)
	if err != nil || absent {
		return 0
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Mode & unix.S_IFMT
}

func (w *workTree) exists(path string) bool {
	if !safePath(path) {
		return false
	}
	kind := w.kind(path)
	return kind == unix.S_IFREG || kind == unix.S_IFLNK
}

// read returns the entry for a file, having written its object unless it is that of
// was, which the repository has. What is neither a file nor a symbolic link is no file.
func (w *workTree) read(ctx context.Context, path string, was entry) (entry, error) {
	if err := ctx.Err(); err != nil {
		return entry{}, context.Cause(ctx)
	}
	fd, absent, err := w.open(path, unix.O_PATH)
	if err != nil || absent {
		return entry{}, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return entry{}, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(fd, "", buf)
		if err != nil {
			return entry{}, fmt.Errorf("cannot read %s: %w", visible(path), err)
		}
		oid, err := w.blob(buf[:n], was.oid)
		return entry{modeSymlink, oid}, err
	case unix.S_IFREG:
		mode := modeFile
		switch {
		case !w.modes && was.mode == modeExecutable, w.modes && st.Mode&0o100 != 0:
			mode = modeExecutable
		}
		oid, err := w.readFile(path, was.oid)
		if oid == "" || err != nil {
			return entry{}, err
		}
		return entry{mode, oid}, nil
	}
	return entry{}, nil
}

func (w *workTree) blob(data []byte, was string) (string, error) {
	if oid := w.objects.format.oid("blob", data); oid == was {
		return oid, nil
	}
	return w.objects.put("blob", data)
}

// readFile returns "" when the file is gone.
func (w *workTree) readFile(path, was string) (string, error) {
	fd, absent, err := w.open(path, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil || absent {
		return "", err
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	for range readTries {
		oid, err := w.readOnce(f, was)
		if !errors.Is(err, errShort) {
			if err != nil {
				err = fmt.Errorf("cannot read %s: %w", visible(path), err)
			}
			return oid, err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return "", err
		}
	}
	return "", api.Errorf(api.Busy, "%s is being written to", visible(path)).WithHint("banger up")
}

func (w *workTree) readOnce(f *os.File, was string) (string, error) {
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", nil
	}
	w.bytesRead += info.Size()
	w.progress.Bytes(w.bytesRead, 0)
	if info.Size() <= wholeFile {
		var buf bytes.Buffer
		buf.Grow(int(info.Size()) + bytes.MinRead)
		if _, err := buf.ReadFrom(io.LimitReader(f, wholeFile+1)); err != nil {
			return "", err
		}
		if buf.Len() > wholeFile {
			return "", errShort
		}
		return w.blob(buf.Bytes(), was)
	}
	h := w.objects.format.hash()
	fmt.Fprintf(h, "blob %d\x00", info.Size())
	if err := copyExactly(h, f, info.Size()); err != nil {
		return "", err
	}
	if hex.EncodeToString(h.Sum(nil)) == was {
		return was, nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	return w.objects.stream("blob", info.Size(), f)
}

// missing lists files of a tree whose objects a partial clone does not have.
func (s *shadow) missing(ctx context.Context, tree string) (bool, error) {
	out, err := s.git.run(ctx, nil, "rev-list", "--objects", "--missing=print", "--no-object-names", tree)
	if err != nil {
		return false, err
	}
	return bytes.HasPrefix(out, []byte("?")) || strings.Contains(string(out), "\n?"), nil
}
