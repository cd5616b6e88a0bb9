package rootdisk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"banger/internal/daemon/hostcmd"
)

const (
	// ProgramEnv names the environment variable that replaces Program.
	ProgramEnv = "BANGER_QEMU_IMG"
	// Program makes overlays, and is looked up in PATH. Debian has it in the package
	// qemu-utils.
	Program = "qemu-img"
)

// findQemuImg returns a path, or an error that says what to install.
func findQemuImg() (string, error) {
	name := os.Getenv(ProgramEnv)
	if name == "" {
		return hostcmd.LookPath(Program)
	}
	path, err := hostcmd.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("cannot use %s: %w", ProgramEnv, err)
	}
	return path, nil
}

func fillQCOW2(ctx context.Context, base *os.File, tmp string, size int64) error {
	program, err := findQemuImg()
	if err != nil {
		return err
	}
	// "..", in the path that goes into the disk, is resolved by the kernel: a symbolic
	// link on the way would lead elsewhere than filepath.Rel thinks.
	dir, err := filepath.EvalSymlinks(filepath.Dir(tmp))
	if err != nil {
		return err
	}
	image, err := filepath.EvalSymlinks(base.Name())
	if err != nil {
		return err
	}
	backing, err := filepath.Rel(dir, image)
	if err != nil {
		return err
	}
	// The file is made first: it is for its owner alone, whatever umask qemu-img has.
	f, err := newFile(tmp)
	if err != nil {
		return err
	}
	f.Close()
	// "./" keeps a name with a colon from being taken for a protocol.
	_, err = hostcmd.Run(ctx, hostcmd.Command{
		Dir: dir,
		Argv: []string{program, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "./" + backing,
			"./" + filepath.Base(tmp), strconv.FormatInt(size, 10)},
	})
	return err
}

// header is the part of a qcow2 header that all versions share. See
// docs/interop/qcow2.txt in QEMU's source.
type header struct {
	Magic, Version uint32
	BackingOffset  uint64
	BackingSize    uint32
	ClusterBits    uint32
	Size           uint64
}

const (
	qcow2Magic = 0x514649fb // "QFI\xfb"
	maxBacking = 1023       // bytes of the backing file's name
)

// verifyQCOW2 looks for what keeps QEMU from opening an overlay, to say it in words.
// The header is not the guest's to write: it sees only what the clusters hold.
func verifyQCOW2(path string) error {
	if err := verifyRaw(path); err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	var h header
	if err := binary.Read(f, binary.BigEndian, &h); err != nil || h.Magic != qcow2Magic {
		return errors.New("it is no qcow2 file")
	}
	if h.BackingOffset == 0 || h.BackingSize == 0 || h.BackingSize > maxBacking {
		return errors.New("it names no image that it is based on")
	}
	name := make([]byte, h.BackingSize)
	if _, err := io.ReadFull(io.NewSectionReader(f, int64(h.BackingOffset), int64(h.BackingSize)), name); err != nil {
		return errors.New("it names no image that it is based on")
	}
	backing := string(name)
	if !filepath.IsAbs(backing) {
		// Not filepath.Join, which would shorten "a/.." without asking what a is.
		backing = filepath.Dir(path) + "/" + backing
	}
	if _, err := os.Stat(backing); err != nil {
		return fmt.Errorf("the image that it is based on: %w", err)
	}
	return nil
}
