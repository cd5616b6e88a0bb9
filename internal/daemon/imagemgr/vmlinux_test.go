package imagemgr

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"

	"github.com/pierrec/lz4/v4"
)

// fakeVmlinux is the smallest ELF that passes for a kernel, with filler of size bytes.
func fakeVmlinux(t testing.TB, pvh bool, size int) []byte {
	t.Helper()
	kind := uint32(pvhEntry)
	if !pvh {
		kind = 1
	}
	note := make([]byte, 12, 32)
	binary.LittleEndian.PutUint32(note, 4)
	binary.LittleEndian.PutUint32(note[4:], 4)
	binary.LittleEndian.PutUint32(note[8:], kind)
	note = append(note, "Xen\x00\x00\x00\x00\x01"...)
	var b bytes.Buffer
	header := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1, Shentsize: 64,
	}
	prog := elf.Prog64{Type: uint32(elf.PT_NOTE), Off: 120, Filesz: uint64(len(note)), Memsz: uint64(len(note))}
	for _, v := range []any{header, prog, note} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	page := make([]byte, 4096)
	for i := range page {
		page[i] = byte(rand.IntN(4)) // compressible, not trivial
	}
	out := append(b.Bytes(), bytes.Repeat(page, size/len(page)+1)...)
	return out[:b.Len()+size]
}

// bzImage wraps a payload as the boot protocol says.
func bzImage(payload []byte) []byte {
	const sectors, offset = 3, 100
	d := make([]byte, (sectors+1)*512+offset)
	d[setupSectsAt] = sectors
	copy(d[headerMagicAt:], "HdrS")
	binary.LittleEndian.PutUint16(d[protocolAt:], 0x020f)
	binary.LittleEndian.PutUint32(d[payloadOffsetAt:], offset)
	binary.LittleEndian.PutUint32(d[payloadLengthAt:], uint32(len(payload)))
	return append(append(d, payload...), make([]byte, 64)...)
}

func withSize(data []byte, size int) []byte {
	return binary.LittleEndian.AppendUint32(data, uint32(size))
}

func lz4Legacy(t testing.TB, data []byte) []byte {
	t.Helper()
	out := []byte{0x02, 0x21, 0x4c, 0x18}
	for len(data) > 0 {
		n := min(len(data), 8<<20)
		block := make([]byte, lz4.CompressBlockBound(n))
		m, err := lz4.CompressBlock(data[:n], block, nil)
		if err != nil || m == 0 {
			t.Fatalf("cannot compress: %d, %v", m, err)
		}
		out = append(withSize(out, m), block[:m]...)
		data = data[n:]
	}
	return out
}

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestExtractVmlinux(t *testing.T) {
	// More than one block of LZ4.
	kernel := fakeVmlinux(t, true, 9<<20)
	packed := map[string][]byte{
		"lz4":  withSize(lz4Legacy(t, kernel), len(kernel)),
		"gzip": gzipped(t, kernel),
		"none": kernel,
	}
	for _, tool := range []string{"xz", "zstd"} {
		cmd := exec.Command(tool, "-1", "-c")
		if tool == "xz" {
			cmd.Args = append(cmd.Args, "--check=crc32")
		}
		cmd.Stdin = bytes.NewReader(kernel)
		out, err := cmd.Output()
		if err != nil {
			t.Logf("%s is not covered: %v", tool, err)
			continue
		}
		packed[tool] = withSize(out, len(kernel))
	}
	for name, payload := range packed {
		t.Run(name, func(t *testing.T) {
			got, err := extractVmlinux(context.Background(), bzImage(payload))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, kernel) {
				t.Errorf("%d bytes came out that are not the %d that went in", len(got), len(kernel))
			}
		})
	}
}

func TestExtractVmlinuxRefuses(t *testing.T) {
	good := fakeVmlinux(t, true, 1000)
	lz := withSize(lz4Legacy(t, good), len(good))
	arm := bytes.Clone(good)
	binary.LittleEndian.PutUint16(arm[18:], uint16(elf.EM_AARCH64))
	for _, tc := range []struct {
		name string
		in   []byte
		says string
	}{
		{"empty", nil, "no bzImage"},
		{"text", bytes.Repeat([]byte("x"), 4096), "no bzImage"},
		{"cut short", bzImage(lz)[:2200], "cut short"},
		{"block cut short", bzImage(withSize(lz[:len(lz)-40], len(good))), "unexpected EOF"},
		{"wrong size", bzImage(withSize(lz4Legacy(t, good), len(good)+1)), "came out"},
		{"more than said", bzImage(withSize(lz4Legacy(t, good), 100)), "too short"},
		{"a bomb", bzImage(withSize(lz4Legacy(t, good), 1<<31)), "too many"},
		{"lzma", bzImage([]byte{0x5d, 0, 0, 0, 0, 0, 0, 0, 0, 0}), "not one that banger knows"},
		{"unknown", bzImage([]byte("abcdefghijkl\x00\x00\x00\x00")), "unknown compression"},
		{"no ELF", bzImage(withSize(lz4Legacy(t, bytes.Repeat([]byte("x"), 500)), 500)), "no kernel"},
		{"another machine", bzImage(withSize(lz4Legacy(t, arm), len(arm))), "x86-64"},
		{"no PVH", bzImage(withSize(lz4Legacy(t, fakeVmlinux(t, false, 1000)), len(good))), "PVH"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := extractVmlinux(context.Background(), tc.in)
			if err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v, want something about %q", err, tc.says)
			}
		})
	}
}

func FuzzExtractVmlinux(f *testing.F) {
	good := fakeVmlinux(f, true, 200)
	f.Add(bzImage(withSize(lz4Legacy(f, good), len(good))))
	f.Add(bzImage(gzipped(f, good)))
	f.Add(bzImage(good))
	f.Fuzz(func(t *testing.T, data []byte) {
		payload, err := bzImagePayload(data)
		if err != nil {
			return
		}
		// The formats that need a tool would start a process for each input.
		if bytes.HasPrefix(payload, []byte{0x28, 0xb5}) || bytes.HasPrefix(payload, []byte{0xfd}) {
			return
		}
		// A size that nobody would believe only costs the test memory.
		if size := binary.LittleEndian.Uint32(payload[len(payload)-4:]); size > 1<<20 {
			return
		}
		if out, err := extractVmlinux(context.Background(), data); err == nil && !bytes.HasPrefix(out, []byte(elf.ELFMAG)) {
			t.Errorf("%d bytes came out that are no ELF", len(out))
		}
	})
}
