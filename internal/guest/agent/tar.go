package agent

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"syscall"
	"time"

	"banger/internal/guest/wire"
)

// untar unpacks an archive into job.Dir, which it makes. All goes through an
// os.Root: no entry gets out of the directory, neither by its name nor through a
// symbolic link. What is in the way of an entry is replaced, except a directory
// that is not empty.
func untar(r io.Reader, job wire.Tree) error {
	if err := os.MkdirAll(job.Dir, 0o755); err != nil {
		return fmt.Errorf("cannot make the directory: %w", err)
	}
	root, err := os.OpenRoot(job.Dir)
	if err != nil {
		return fmt.Errorf("cannot open the directory: %w", err)
	}
	defer root.Close()
	u := unpacker{root: root, keepOwners: job.KeepOwners}
	in := &endReader{r: bufio.NewReaderSize(r, 64<<10)}
	archive := tar.NewReader(in)
	for {
		h, err := archive.Next()
		if err == io.EOF && in.ended {
			return errors.New("cannot read the archive: it is cut off")
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("cannot read the archive: %w", err)
		}
		if err := u.entry(h, archive); err != nil {
			return fmt.Errorf("cannot unpack %q: %w", h.Name, err)
		}
	}
	if err := u.finish(); err != nil {
		return err
	}
	// What pads the archive is read, so that its sender is not left with it.
	_, err = io.Copy(io.Discard, r)
	return err
}

// endReader notes that its reader's end was reached, which an archive's end, two
// blocks of zeros, comes before.
type endReader struct {
	r     io.Reader
	ended bool
}

func (e *endReader) Read(b []byte) (int, error) {
	n, err := e.r.Read(b)
	e.ended = e.ended || err == io.EOF
	return n, err
}

type unpacker struct {
	root       *os.Root
	keepOwners bool
	dirs       []*tar.Header // modes and times are set last: a directory may be read-only
}

func (u *unpacker) entry(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if path.IsAbs(h.Name) {
		return errors.New("the name is absolute")
	}
	h.Name = path.Clean(h.Name)
	if !fs.ValidPath(h.Name) {
		return errors.New("the name leads out of the directory")
	}
	if h.Typeflag == tar.TypeDir {
		return u.dir(h)
	}
	if h.Name == "." {
		return errors.New("it is the directory itself")
	}
	if err := u.root.MkdirAll(path.Dir(h.Name), 0o755); err != nil {
		return err
	}
	if err := u.root.Remove(h.Name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		return u.file(h, content)
	case tar.TypeSymlink:
		if err := u.root.Symlink(h.Linkname, h.Name); err != nil {
			return err
		}
		return u.own(h)
	case tar.TypeLink:
		target := path.Clean(h.Linkname)
		if !fs.ValidPath(target) {
			return errors.New("the link leads out of the directory")
		}
		return u.root.Link(target, h.Name)
	}
	return fmt.Errorf("entries of type %q are not unpacked", h.Typeflag)
}

func (u *unpacker) dir(h *tar.Header) error {
	u.dirs = append(u.dirs, h)
	if h.Name == "." {
		return nil
	}
	if info, err := u.root.Lstat(h.Name); err == nil && !info.IsDir() {
		if err := u.root.Remove(h.Name); err != nil {
			return err
		}
	}
	return u.root.MkdirAll(h.Name, 0o755)
}

func (u *unpacker) file(h *tar.Header, content io.Reader) (err error) {
	f, err := u.root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err == nil {
			err = u.root.Chtimes(h.Name, time.Time{}, h.ModTime)
		}
	}()
	if _, err := io.Copy(f, content); err != nil {
		return err
	}
	if err := u.own(h); err != nil {
		return err
	}
	return f.Chmod(h.FileInfo().Mode()) // after own, which clears setuid
}

func (u *unpacker) own(h *tar.Header) error {
	if !u.keepOwners {
		return nil
	}
	return u.root.Lchown(h.Name, h.Uid, h.Gid)
}

// finish sets the modes and times of directories, inner ones first.
func (u *unpacker) finish() error {
	for _, h := range slices.Backward(u.dirs) {
		// A later entry may have taken the directory's place.
		if info, err := u.root.Lstat(h.Name); err != nil || !info.IsDir() {
			continue
		}
		err := u.own(h)
		if err == nil {
			err = u.root.Chmod(h.Name, h.FileInfo().Mode())
		}
		if err == nil {
			err = u.root.Chtimes(h.Name, time.Time{}, h.ModTime)
		}
		if err != nil {
			return fmt.Errorf("cannot unpack %q: %w", h.Name, err)
		}
	}
	return nil
}

// tarTree packs job.Paths below job.Dir, or all of it, in the order of names.
// Sockets and devices are left out: they mean nothing elsewhere.
func tarTree(w io.Writer, job wire.Tree) error {
	root, err := os.OpenRoot(job.Dir)
	if err != nil {
		return fmt.Errorf("cannot open the directory: %w", err)
	}
	defer root.Close()
	out := bufio.NewWriterSize(w, 64<<10)
	p := packer{root: root, out: tar.NewWriter(out), seen: map[inode]string{}}
	paths := job.Paths
	if len(paths) == 0 {
		paths = []string{"."}
	}
	for _, name := range paths {
		if err := p.pack(path.Clean(name)); err != nil {
			return err
		}
	}
	if err := p.out.Close(); err != nil {
		return err
	}
	return out.Flush()
}

// inode is the identity of a file with several names.
type inode struct{ dev, ino uint64 }

type packer struct {
	root *os.Root
	out  *tar.Writer
	seen map[inode]string
}

// pack packs name and what lies below it.
func (p *packer) pack(name string) error {
	visit := func(name string, _ fs.DirEntry, err error) error {
		if err == nil {
			err = p.entry(name)
		}
		if err != nil {
			return fmt.Errorf("cannot pack %q: %w", name, err)
		}
		return nil
	}
	// WalkDir follows a link that it begins at.
	if info, err := p.root.Lstat(name); err != nil || !info.IsDir() {
		return visit(name, nil, err)
	}
	return fs.WalkDir(p.root.FS(), name, visit)
}

func (p *packer) entry(name string) error {
	info, err := p.root.Lstat(name)
	if err != nil {
		return err
	}
	link := ""
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return p.file(name)
	case mode.IsDir():
	case mode.Type() == fs.ModeSymlink:
		if link, err = p.root.Readlink(name); err != nil {
			return err
		}
	default:
		return nil
	}
	h, err := header(name, info, link)
	if err != nil {
		return err
	}
	return p.out.WriteHeader(h)
}

// file packs a regular file as it is found when it is opened. What is appended
// meanwhile is left out, what is cut off is an error.
func (p *packer) file(name string) error {
	f, err := p.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("it was replaced while it was read")
	}
	h, err := header(name, info, "")
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink > 1 {
		id := inode{uint64(st.Dev), st.Ino}
		if first, ok := p.seen[id]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return p.out.WriteHeader(h)
		}
		p.seen[id] = name
	}
	if err := p.out.WriteHeader(h); err != nil {
		return err
	}
	n, err := io.CopyN(p.out, f, h.Size)
	if err == io.EOF {
		return fmt.Errorf("it shrank from %d to %d bytes while it was read", h.Size, n)
	}
	return err
}

func header(name string, info fs.FileInfo, link string) (*tar.Header, error) {
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return nil, err
	}
	h.Name = name
	if info.IsDir() {
		h.Name += "/"
	}
	h.Format = tar.FormatPAX // names of any length, times below a second
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	return h, nil
}
