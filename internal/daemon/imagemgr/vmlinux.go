package imagemgr

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/pierrec/lz4/v4"

	"banger/internal/daemon/hostcmd"
)

// maxVmlinux bounds an unpacked kernel, in bytes; Debian's cloud kernel has 53 MB.
const maxVmlinux = 512 << 20

// Where the boot protocol keeps its fields, see Documentation/arch/x86/boot.rst of
// the kernel.
const (
	setupSectsAt    = 0x1f1
	headerMagicAt   = 0x202 // "HdrS"
	protocolAt      = 0x206
	payloadOffsetAt = 0x248 // from the end of the setup sectors
	payloadLengthAt = 0x24c
	headerEnd       = 0x250
	payloadProtocol = 0x0208 // the first with a payload
)

// extractVmlinux takes the ELF file out of a bzImage. QEMU and Firecracker boot it
// without the decompressor's detour.
func extractVmlinux(ctx context.Context, vmlinuz []byte) ([]byte, error) {
	payload, err := bzImagePayload(vmlinuz)
	if err != nil {
		return nil, err
	}
	vmlinux, err := unpackPayload(ctx, payload)
	if err != nil {
		return nil, fmt.Errorf("cannot unpack the kernel: %w", err)
	}
	if err := checkVmlinux(vmlinux); err != nil {
		return nil, err
	}
	return vmlinux, nil
}

// bzImagePayload finds the compressed kernel.
func bzImagePayload(d []byte) ([]byte, error) {
	le := binary.LittleEndian
	if len(d) < headerEnd || string(d[headerMagicAt:headerMagicAt+4]) != "HdrS" {
		return nil, errors.New("it is no bzImage")
	}
	if v := le.Uint16(d[protocolAt:]); v < payloadProtocol {
		return nil, fmt.Errorf("a bzImage of boot protocol %d.%02d names no payload", v>>8, v&0xff)
	}
	sectors := int64(d[setupSectsAt])
	if sectors == 0 {
		sectors = 4
	}
	start := (sectors+1)*512 + int64(le.Uint32(d[payloadOffsetAt:]))
	end := start + int64(le.Uint32(d[payloadLengthAt:]))
	if end-start < 8 || end > int64(len(d)) {
		return nil, errors.New("the bzImage is cut short")
	}
	return d[start:end], nil
}

// unpackPayload knows the formats by their first bytes. All but gzip, which has it
// anyway, are followed by the unpacked size, four bytes that are no part of the
// stream (size_append in scripts/Makefile.lib of the kernel).
func unpackPayload(ctx context.Context, payload []byte) ([]byte, error) {
	body := payload[:len(payload)-4]
	size := binary.LittleEndian.Uint32(payload[len(payload)-4:])
	if size > maxVmlinux {
		return nil, fmt.Errorf("%d MiB are too many", size>>20)
	}
	var out []byte
	var err error
	switch {
	case bytes.HasPrefix(payload, []byte{0x1f, 0x8b}):
		out, err = gunzip(payload)
	case bytes.HasPrefix(payload, []byte{0x02, 0x21, 0x4c, 0x18}):
		out, err = unpackLZ4(body[4:], int(size))
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		out, err = filter(ctx, body, "zstd", "--decompress", "--stdout", "--quiet")
	case bytes.HasPrefix(payload, []byte("\xfd7zXZ\x00")):
		out, err = filter(ctx, body, "xz", "--decompress", "--stdout", "--single-stream")
	case bytes.HasPrefix(payload, []byte("BZh")), bytes.HasPrefix(payload, []byte{0x5d, 0, 0}):
		return nil, errors.New("its compression is not one that banger knows")
	case bytes.HasPrefix(payload, []byte(elf.ELFMAG)):
		out = payload
	default:
		return nil, fmt.Errorf("unknown compression %x", payload[:6])
	}
	if err != nil {
		return nil, err
	}
	if !bytes.HasPrefix(payload, []byte(elf.ELFMAG)) && uint32(len(out)) != size {
		return nil, fmt.Errorf("%d bytes came out, not %d", len(out), size)
	}
	return out, nil
}

func gunzip(data []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	r.Multistream(false)
	return io.ReadAll(io.LimitReader(r, maxVmlinux+1))
}

// unpackLZ4 reads the blocks of LZ4's legacy frame, after its magic: a length of
// four bytes, then a block of at most 8 MiB unpacked.
func unpackLZ4(data []byte, size int) ([]byte, error) {
	const blockMax = 8 << 20
	out := make([]byte, 0, size)
	block := make([]byte, min(size, blockMax))
	for len(data) > 0 {
		if len(data) < 4 {
			return nil, io.ErrUnexpectedEOF
		}
		n := binary.LittleEndian.Uint32(data)
		data = data[4:]
		if uint64(n) > uint64(len(data)) {
			return nil, io.ErrUnexpectedEOF
		}
		got, err := lz4.UncompressBlock(data[:n], block)
		if err != nil {
			return nil, err
		}
		data = data[n:]
		if out = append(out, block[:got]...); len(out) > size {
			return nil, fmt.Errorf("more than %d bytes came out", size)
		}
	}
	return out, nil
}

// filter runs a decompressor.
func filter(ctx context.Context, in []byte, argv ...string) ([]byte, error) {
	out := &bounded{max: maxVmlinux}
	_, err := hostcmd.Run(ctx, hostcmd.Command{Argv: argv, Stdin: bytes.NewReader(in), Stdout: out})
	return out.Bytes(), err
}

// bounded is a buffer that refuses more than max bytes.
type bounded struct {
	bytes.Buffer
	max int
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.Len()+len(p) > b.max {
		return 0, fmt.Errorf("more than %d MiB came out", b.max>>20)
	}
	return b.Buffer.Write(p)
}

// pvhEntry is the type of the ELF note with the entry point that a VMM uses,
// XEN_ELFNOTE_PHYS32_ENTRY of include/xen/interface/elfnote.h.
const pvhEntry = 18

// checkVmlinux refuses what a VMM could not boot.
func checkVmlinux(vmlinux []byte) error {
	f, err := elf.NewFile(bytes.NewReader(vmlinux))
	if err != nil {
		return fmt.Errorf("what is in the bzImage is no kernel: %w", err)
	}
	defer f.Close()
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC {
		return fmt.Errorf("the kernel is a %s for %s, not an executable for x86-64", f.Type, f.Machine)
	}
	for _, prog := range f.Progs {
		if prog.Type != elf.PT_NOTE {
			continue
		}
		notes, err := io.ReadAll(io.LimitReader(prog.Open(), 1<<20))
		if err != nil {
			return fmt.Errorf("cannot read the kernel's notes: %w", err)
		}
		if hasNote(notes, "Xen", pvhEntry) {
			return nil
		}
	}
	return errors.New("the kernel has no PVH entry point (CONFIG_PVH), so no VMM could start it")
}

// hasNote walks ELF notes: three words, then name and content, each padded to four.
func hasNote(notes []byte, owner string, kind uint32) bool {
	le := binary.LittleEndian
	pad := func(n uint32) uint64 { return (uint64(n) + 3) &^ 3 }
	for len(notes) >= 12 {
		nameLen, descLen, noteType := le.Uint32(notes), le.Uint32(notes[4:]), le.Uint32(notes[8:])
		notes = notes[12:]
		if pad(nameLen)+pad(descLen) > uint64(len(notes)) {
			return false
		}
		name := string(bytes.TrimRight(notes[:nameLen], "\x00"))
		if name == owner && noteType == kind {
			return true
		}
		notes = notes[pad(nameLen)+pad(descLen):]
	}
	return false
}

// writeVmlinux extracts the kernel at from into the file to.
func writeVmlinux(ctx context.Context, from, to string) error {
	vmlinuz, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	vmlinux, err := extractVmlinux(ctx, vmlinuz)
	if err != nil {
		return fmt.Errorf("cannot take the kernel out of %s: %w", from, err)
	}
	return os.WriteFile(to, vmlinux, 0o600)
}
