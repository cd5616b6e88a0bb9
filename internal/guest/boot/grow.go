package boot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ext4ResizeFS is EXT4_IOC_RESIZE_FS of the kernel's fs/ext4/ext4.h:
// _IOW('f', 16, __u64), the new size in blocks.
const ext4ResizeFS = 1<<30 | 8<<16 | 'f'<<8 | 16

// growRoot makes the root file system as large as its disk. A failure is a
// warning: the guest works, smaller.
func (g *guest) growRoot() error {
	if g.cfg.Root.FSType != "ext4" {
		return nil
	}
	if err := growExt4(g.root, newRoot); err != nil {
		warn(fmt.Errorf("cannot grow the root file system: %w", err))
	}
	return nil
}

// growExt4 resizes online the file system of device, which is mounted on dir.
func growExt4(device, dir string) error {
	disk, err := os.Open(device)
	if err != nil {
		return err
	}
	defer disk.Close()
	size, err := disk.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	super := make([]byte, ext4SuperLen)
	if _, err := disk.ReadAt(super, ext4SuperOffset); err != nil {
		return err
	}
	have, blockSize, err := ext4Size(super)
	if err != nil {
		return err
	}
	want := uint64(size) / blockSize
	if want <= have {
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, d.Fd(), ext4ResizeFS, uintptr(unsafe.Pointer(&want))); errno != 0 {
		return fmt.Errorf("from %d to %d blocks: %w", have, want, errno)
	}
	note("grew the root file system from %d to %d blocks of %d bytes", have, want, blockSize)
	return nil
}

const (
	ext4SuperOffset = 1024
	ext4SuperLen    = 1024
)

// ext4Size reads a superblock, see the kernel's Documentation/filesystems/ext4/super.rst.
func ext4Size(super []byte) (blocks, blockSize uint64, err error) {
	const (
		blocksLo  = 0x4
		logSize   = 0x18
		magic     = 0x38
		incompat  = 0x60
		blocksHi  = 0x150
		feature64 = 0x80
	)
	le := binary.LittleEndian
	if len(super) < ext4SuperLen || le.Uint16(super[magic:]) != 0xEF53 {
		return 0, 0, errors.New("no ext4 superblock")
	}
	shift := le.Uint32(super[logSize:])
	if shift > 6 { // 64 KiB, the largest that ext4 knows
		return 0, 0, fmt.Errorf("block size 1024<<%d", shift)
	}
	blocks = uint64(le.Uint32(super[blocksLo:]))
	if le.Uint32(super[incompat:])&feature64 != 0 {
		blocks |= uint64(le.Uint32(super[blocksHi:])) << 32
	}
	return blocks, 1024 << shift, nil
}
