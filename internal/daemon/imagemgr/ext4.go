package imagemgr

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"banger/internal/daemon/hostcmd"
)

const (
	blockSize = 4096
	inodeSize = 256
	// bytesPerInode is mke2fs's usual ratio; it stays with the file system when that
	// grows. Small file systems would get another one by default.
	bytesPerInode = 16384
	// journalSize is fixed when the file system is made, and a larger one than fits a
	// small image pays off once it has grown.
	journalSize = 64 << 20
	// maxGrown is how far a root file system can grow while it is mounted: 1 TiB.
	maxGrown = 1 << 40
)

// ext4Features is the same set whatever mke2fs.conf(5) of the host says; all of it
// is in Linux 4.0 and later.
const ext4Features = "none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"

// fsSpec is a file system to make.
type fsSpec struct {
	image  string // a new file
	tree   string // the directory that it gets a copy of
	label  string // at most 16 bytes
	size   int64  // bytes
	inodes int64  // 0: by bytesPerInode
	// grows: it is mounted for writing and grows. Without, it is read only.
	grows bool
}

// mkfsArgs makes a file system that has no work left for the kernel: with the
// inode tables written here, no thread of the guest does it after the first mount.
func mkfsArgs(s fsSpec) []string {
	features, extended := ext4Features, "lazy_itable_init=0,lazy_journal_init=1,root_owner=0:0"
	argv := []string{"mkfs.ext4", "-q", "-F", "-b", strconv.Itoa(blockSize), "-I", strconv.Itoa(inodeSize), "-L", s.label}
	if s.inodes > 0 {
		argv = append(argv, "-N", strconv.FormatInt(s.inodes, 10))
	} else {
		argv = append(argv, "-i", strconv.Itoa(bytesPerInode))
	}
	if s.grows {
		features += ",has_journal,resize_inode"
		extended += ",resize=" + strconv.FormatInt(maxGrown/blockSize, 10)
		argv = append(argv, "-m", "1", "-J", "size="+strconv.Itoa(journalSize>>20))
	} else {
		argv = append(argv, "-m", "0")
	}
	return append(argv, "-O", features, "-E", extended, "-d", s.tree, s.image)
}

// makeExt4 makes the file system; wrap decides who owns what is in it.
func makeExt4(ctx context.Context, s fsSpec, wrap func(argv ...string) []string) error {
	f, err := os.OpenFile(s.image, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = f.Truncate(s.size)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	_, err = hostcmd.Run(ctx, hostcmd.Command{Argv: wrap(mkfsArgs(s)...)})
	return err
}

// checkExt4 fails unless e2fsck finds nothing to say.
func checkExt4(ctx context.Context, image string) error {
	out, err := hostcmd.Run(ctx, hostcmd.Command{Argv: []string{"e2fsck", "-f", "-n", image}})
	if err != nil {
		return fmt.Errorf("the file system that was made is damaged: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// content is what has to fit into a file system.
type content struct {
	blocks, inodes int64
}

// add counts one file, directory or link with size bytes of data.
func (c *content) add(size int64) {
	c.inodes++
	c.blocks += (size + blockSize - 1) / blockSize
}

// rootSize is the size in bytes of a root file system for c: room for the first
// steps of a guest whose disk is no larger than its image.
func rootSize(c content) int64 {
	const step = 64 << 20
	size := c.blocks*blockSize*13/10 + journalSize + 32<<20
	size = max(size, c.inodes*5/4*bytesPerInode)
	return (size + step - 1) / step * step
}

// packedSize is the size in bytes of a read-only file system for c, and the number
// of its inodes.
func packedSize(c content) (size, inodes int64) {
	const reserved = 16 // the first inodes are ext4's own
	inodes = c.inodes + reserved + 16
	size = c.blocks*blockSize + c.blocks*blockSize/50 + inodes*inodeSize + 2<<20
	return (size + 1<<20 - 1) >> 20 << 20, inodes
}
