package initrd

import (
	"fmt"
	"io"
	"strings"
)

// The file types of cpio's mode field are those of stat(2).
const (
	typeDir  = 0o040000
	typeFile = 0o100000
)

// maxSize is what the eight hex digits of a newc header can say.
const maxSize = 1<<32 - 1

type entry struct {
	name string // relative, no leading slash
	mode uint32
	size int64
}

// archive writes the "newc" format, see the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst. Owner, times and
// device are zero. The first error sticks and is returned by close.
type archive struct {
	w       io.Writer
	ino     uint32
	written int64
	err     error
}

func newArchive(w io.Writer) *archive { return &archive{w: w} }

func (a *archive) Write(p []byte) (int, error) {
	n, err := a.w.Write(p)
	a.written += int64(n)
	return n, err
}

func (a *archive) add(e entry, content io.Reader) {
	if a.err != nil {
		return
	}
	if e.size > maxSize {
		a.err = fmt.Errorf("%s is too large for an initramfs: %d bytes", e.name, e.size)
		return
	}
	a.ino++
	links := 1
	if e.mode&typeDir != 0 {
		links = 2
	}
	// magic ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
	header := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.ino, e.mode, 0, 0, links, 0, e.size, 0, 0, 0, 0, len(e.name)+1, 0)
	if _, a.err = io.WriteString(a, header+e.name+"\x00"); a.err != nil {
		return
	}
	if a.pad(); a.err != nil || e.size == 0 {
		return
	}
	if _, a.err = io.CopyN(a, content, e.size); a.err != nil {
		a.err = fmt.Errorf("cannot add %s: %w", e.name, a.err)
		return
	}
	a.pad()
}

// pad fills up to the multiple of four bytes at which headers and contents begin.
func (a *archive) pad() {
	if rest := a.written % 4; rest != 0 && a.err == nil {
		_, a.err = io.WriteString(a, strings.Repeat("\x00", int(4-rest)))
	}
}

func (a *archive) close() error {
	a.ino = 0
	a.add(entry{name: "TRAILER!!!"}, nil)
	return a.err
}
