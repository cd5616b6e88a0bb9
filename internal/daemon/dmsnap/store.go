package dmsnap

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	sector = 512
	// chunk is what the snapshot copies at a time. A file system's block is as large, so
	// nothing is copied that is not overwritten.
	chunk = 4096
	mib   = 1 << 20

	version = 1
	magic   = "banger dm-snapshot disk\n"
	// headerSize is how much of the file is read for the header; storeOffset is where
	// the store begins.
	headerSize  = 8 << 10
	storeOffset = mib
	maxSize     = 1 << 50 // far above config.MaxDisk, far below where sums overflow
)

// header is what the file says about the disk: the magic, then this as JSON, then
// zeros. It is not the guest's to write.
type header struct {
	Version int `json:"version"`
	// Base is the image's path, relative to the directory of the disk.
	Base  string   `json:"base"`
	Image identity `json:"image"`
	// Size is the disk's as the guest sees it, Store the store's; both in bytes.
	Size  int64 `json:"size"`
	Store int64 `json:"store"`
}

// identity is what the image was when the disk was made.
type identity struct {
	Size  int64  `json:"size"`
	Mtime int64  `json:"mtime"` // ns
	Inode uint64 `json:"inode"`
	// Sample is a checksum over parts of it. It is asked when only the inode differs:
	// then the state directory was copied or restored, or the image was exchanged.
	Sample string `json:"sample"`
}

// storeSize is what a store needs in which all chunks of an image are: a chunk of
// header, and after each 256 chunks' places, 16 bytes each, the 256 chunks. One area
// more is made when the last is full. See drivers/md/dm-snap-persistent.c in the
// kernel's source.
func storeSize(base int64) int64 {
	const perArea = chunk / 16
	chunks := (base + chunk - 1) / chunk
	areas := chunks/perArea + 2
	return roundUp((1+chunks+areas)*chunk, mib)
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

func (h header) tailOffset() int64 { return storeOffset + h.Store }
func (h header) tailSize() int64   { return h.Size - h.Image.Size }
func (h header) fileSize() int64   { return roundUp(h.tailOffset()+h.tailSize(), chunk) }

// write makes the file, for its owner alone, and syncs it.
func (h header) write(path string) error {
	text, err := h.encode()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	// The size comes first, so that a file system with a limit refuses at once.
	if err := f.Truncate(h.fileSize()); err != nil {
		return err
	}
	if _, err := f.WriteAt(text, 0); err != nil {
		return err
	}
	return f.Sync()
}

func (h header) encode() ([]byte, error) {
	text, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	text = append([]byte(magic), text...)
	if len(text) > headerSize {
		return nil, fmt.Errorf("the image's path has %d bytes, which is too long", len(h.Base))
	}
	return append(text, make([]byte, headerSize-len(text))...), nil
}

var errNoDisk = errors.New("it is no disk of dm-snapshot")

// decode is strict: what it lets through is a layout that fits together.
func decode(data []byte) (header, error) {
	text, ok := bytes.CutPrefix(bytes.TrimRight(data, "\x00"), []byte(magic))
	if !ok {
		return header{}, errNoDisk
	}
	var h header
	if err := json.Unmarshal(text, &h); err != nil {
		return header{}, fmt.Errorf("its header is damaged: %w", err)
	}
	if h.Version != version {
		return header{}, fmt.Errorf("it has version %d, this daemon knows version %d", h.Version, version)
	}
	for _, n := range []int64{h.Size, h.Store, h.Image.Size} {
		if n <= 0 || n > maxSize || n%sector != 0 {
			return header{}, fmt.Errorf("its header is damaged: a size of %d bytes", n)
		}
	}
	if h.Size < h.Image.Size || h.Store%chunk != 0 || h.Base == "" || filepath.IsAbs(h.Base) || strings.Contains(h.Base, "\x00") {
		return header{}, errors.New("its header is damaged: it does not fit together")
	}
	return h, nil
}

// openStore opens the file of a disk and reads its header. A symbolic link is refused:
// banger made none, so somebody else did.
func openStore(path string) (*os.File, header, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, header{}, err
	}
	h, err := readHeader(f)
	if err != nil {
		f.Close()
		return nil, header{}, err
	}
	return f, h, nil
}

func readHeader(f *os.File) (header, error) {
	info, err := f.Stat()
	if err != nil {
		return header{}, err
	}
	if !info.Mode().IsRegular() {
		return header{}, errors.New("it is no regular file")
	}
	data := make([]byte, headerSize)
	if n, err := f.ReadAt(data, 0); errors.Is(err, io.EOF) {
		data = data[:n]
	} else if err != nil {
		return header{}, err
	}
	return decode(data)
}

// openBase opens the image of the disk at path, unless it is another than it was.
func (h header) openBase(path string) (*os.File, error) {
	// Not filepath.Join, which would shorten "a/.." without asking what a is.
	f, is, err := openImage(filepath.Dir(path) + "/" + h.Base)
	if err != nil {
		return nil, fmt.Errorf("the image that it is based on: %w", err)
	}
	if err := h.Image.verify(f, is); err != nil {
		f.Close()
		return nil, fmt.Errorf("the image that it is based on, %s, has changed: %w", h.Base, err)
	}
	return f, nil
}

func identify(f *os.File) (identity, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return identity{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return identity{}, fmt.Errorf("the image %s is no regular file", f.Name())
	}
	return identity{Size: st.Size, Mtime: st.Mtim.Nano(), Inode: st.Ino}, nil
}

// verify says what of the image differs from what it was.
func (was identity) verify(f *os.File, is identity) error {
	when := func(ns int64) string { return time.Unix(0, ns).UTC().Format("2006-01-02T15:04:05.000000000Z") }
	switch {
	case is.Size != was.Size:
		return fmt.Errorf("it has %d bytes and had %d", is.Size, was.Size)
	case is.Mtime != was.Mtime:
		return fmt.Errorf("it was modified at %s, and before at %s", when(is.Mtime), when(was.Mtime))
	case is.Inode == was.Inode:
		return nil
	}
	got, err := sample(f, is.Size)
	if err == nil && got != was.Sample {
		err = fmt.Errorf("its inode is %d and was %d, and it has other content", is.Inode, was.Inode)
	}
	return err
}

// sample is a checksum over 64 pages spread over the file, the first among them, where
// a file system has its name and its times.
func sample(f *os.File, size int64) (string, error) {
	const pages, page = 64, 4096
	sum := sha256.New()
	for i := range int64(pages) {
		at := size / pages * i / page * page
		if _, err := io.Copy(sum, io.NewSectionReader(f, at, page)); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

const (
	// reserve is how much the store can take in after an Attach, whatever else fills the
	// file system; in bytes.
	reserve = 64 * mib
	// minRoom is what must be left beside it.
	minRoom = 16 * mib
)

// prepare makes the file ready: as long as it must be, with room for the next writes,
// and with a store that is not marked invalid.
func (h header) prepare(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() < h.fileSize() { // cut off, and all beyond it was never written
		if err := f.Truncate(h.fileSize()); err != nil {
			return err
		}
	}
	if err := h.keepRoom(f); err != nil {
		return err
	}
	return h.revive(f)
}

// keepRoom allocates what the store takes in next: it fills from the front.
func (h header) keepRoom(f *os.File) error {
	from, err := unix.Seek(int(f.Fd()), storeOffset, unix.SEEK_HOLE)
	if err != nil {
		return fmt.Errorf("cannot find the end of what is written: %w", err)
	}
	n := min(reserve, h.tailOffset()-from)
	if n <= 0 {
		return nil
	}
	if err := room(f, n+minRoom); err != nil {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, from, n)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot keep %d MiB for what the guest writes: %w", n/mib, err)
	}
	return nil
}

// room is an error when the file system has less than need left, in bytes.
func room(f *os.File, need int64) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return err
	}
	free := int64(st.Bavail) * st.Bsize
	if st.Blocks > 0 && free < need { // some file systems say nothing
		return fmt.Errorf("its file system has %d MiB left and it needs %d: %w", free/mib, (need+mib-1)/mib, unix.ENOSPC)
	}
	return nil
}

// storeHeader is how the kernel's store begins, see drivers/md/dm-snap-persistent.c.
type storeHeader struct{ Magic, Valid, Version, Chunk uint32 }

const storeMagic = 0x70416e53 // "SnAp"

// revive makes a store valid again that the kernel gave up, see the package comment.
func (h header) revive(f *os.File) error {
	var s storeHeader
	if err := binary.Read(io.NewSectionReader(f, storeOffset, 16), binary.LittleEndian, &s); err != nil {
		return err
	}
	switch {
	case s == storeHeader{}: // the kernel has not written to it yet
		return nil
	case s.Magic != storeMagic || s.Version != 1 || s.Chunk != chunk/sector:
		return fmt.Errorf("its store is damaged: it begins with %+v", s)
	case s.Valid != 0:
		return nil
	}
	s.Valid = 1
	if err := binary.Write(io.NewOffsetWriter(f, storeOffset), binary.LittleEndian, s); err != nil {
		return err
	}
	return f.Sync()
}

// absent tells an error that says that there is nothing.
func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV)
}
