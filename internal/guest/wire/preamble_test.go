package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
)

// testMagic overlaps with itself, as a random one may by bad luck.
var testMagic = []byte("abacabadabacabaX")

// record is a sink that writes down what it gets.
type record struct{ bytes.Buffer }

func (r *record) data(p []byte)      { r.Write(p) }
func (r *record) drop()              { fmt.Fprint(r, "<drop>") }
func (r *record) begin(nonce []byte) { fmt.Fprintf(r, "<begin %s>", nonce) }

// demuxAll feeds in, cut at the given sizes in turn, and flushes at the end.
func demuxAll(in []byte, sizes []int) string {
	r := new(record)
	d := newDemux(testMagic, r)
	for i := 0; len(in) > 0; i++ {
		n := len(in)
		if len(sizes) > 0 {
			n = min(n, max(1, sizes[i%len(sizes)]))
		}
		d.feed(in[:n])
		in = in[n:]
	}
	d.flush()
	return r.String()
}

func TestDemux(t *testing.T) {
	magic := string(testMagic)
	const n1, n2 = "0123456789012345", "ABCDEFGHIJKLMNOP"
	for _, test := range []struct{ name, in, want string }{
		{"nothing before a session", "garbage abacaba", ""},
		{"a session", "xx" + magic + n1 + "data", "<drop><begin " + n1 + ">data"},
		{"a magic in a session", magic + n1 + "data" + magic + n2 + "new", "<drop><begin " + n1 + ">data<drop><begin " + n2 + ">new"},
		{"half a magic is data", magic + n1 + "data abacabad.", "<drop><begin " + n1 + ">data abacabad."},
		{"data end like a magic", magic + n1 + "data abacabad", "<drop><begin " + n1 + ">data abacabad"},
		{"half a magic before a magic", magic + n1 + "abacabad" + magic + n2, "<drop><begin " + n1 + ">abacabad<drop><begin " + n2 + ">"},
		{"a magic for a nonce", magic + magic + n2 + "new", "<drop><drop><begin " + n2 + ">new"},
		// The nonce of a host that died in its preamble is made of what follows; the
		// session that it begins gets nothing and is dropped.
		{"a magic beginning in a nonce", magic + "01234" + magic + n2 + "new", "<drop><begin 01234abacabadaba><drop><begin " + n2 + ">new"},
		{"a nonce that ends like a magic", magic + "01234567890abaca" + "bad data", "<drop><begin 01234567890abaca>bad data"},
	} {
		t.Run(test.name, func(t *testing.T) {
			for size := range len(test.in) + 1 {
				got := demuxAll([]byte(test.in), []int{size})
				// Bytes just before a magic may be lost or not, by where the cuts are.
				if want := test.want; got != want && dropLost(got) != dropLost(want) {
					t.Fatalf("cut every %d bytes: got %q, want %q", size, got, want)
				}
			}
		})
	}
}

// dropLost removes the data just before each drop: nobody gets to act on them.
func dropLost(s string) string {
	var out string
	for {
		i := bytes.Index([]byte(s), []byte("<drop>"))
		if i < 0 {
			return out + s
		}
		if j := bytes.LastIndexByte([]byte(s[:i]), '>'); j >= 0 {
			out += s[:j+1]
		}
		out += "<drop>"
		s = s[i+len("<drop>"):]
	}
}

// No byte of a magic may be delivered when the magic comes without a pause.
func TestDemuxKeepsMagicFromSession(t *testing.T) {
	for cut := range MagicLen {
		r := new(record)
		d := newDemux(testMagic, r)
		d.feed(append(bytes.Clone(testMagic), "0123456789012345"...))
		r.Reset()
		d.feed(append([]byte("...."), testMagic[:cut]...))
		if got := r.String(); got != "...." {
			t.Fatalf("cut at %d: the session got %q", cut, got)
		}
		d.feed(testMagic[cut:])
		if got := r.String(); got != "....<drop>" {
			t.Fatalf("cut at %d: got %q", cut, got)
		}
	}
}

// After a pause the bytes are delivered, and the magic is still found.
func TestDemuxFlush(t *testing.T) {
	r := new(record)
	d := newDemux(testMagic, r)
	d.feed(append(bytes.Clone(testMagic), "0123456789012345"...))
	r.Reset()
	d.feed([]byte("...abac"))
	d.flush()
	d.flush()
	d.feed(testMagic[4:])
	if got := r.String(); got != "...abac<drop>" {
		t.Fatalf("got %q", got)
	}
}

// FuzzDemux compares the demux, over random cuts, with one that sees all bytes at
// once and looks for the magic in the simplest way.
func FuzzDemux(f *testing.F) {
	f.Add([]byte("garbage"), uint64(1))
	f.Add(append(bytes.Clone(testMagic), "0123456789012345data abacabad"...), uint64(2))
	f.Add(append(append(bytes.Clone(testMagic[:9]), testMagic...), "01234abac"...), uint64(3))
	f.Add(bytes.Repeat(testMagic, 5), uint64(4))
	f.Fuzz(func(t *testing.T, in []byte, seed uint64) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		sizes := make([]int, 1+rnd.IntN(5))
		for i := range sizes {
			sizes[i] = 1 + rnd.IntN(20)
		}
		got, want := demuxAll(in, sizes), naiveDemux(in)
		if dropLost(got) != dropLost(want) {
			t.Fatalf("cut %v: got %q, want %q", sizes, got, want)
		}
	})
}

// naiveDemux is the rule itself: a magic that ends at a byte begins a nonce there;
// 16 bytes without another magic's end are the nonce, the rest is data.
func naiveDemux(in []byte) string {
	r := new(record)
	state, nonce := noSession, []byte(nil)
	for i, b := range in {
		switch {
		case bytes.HasSuffix(in[:i+1], testMagic):
			r.drop()
			state, nonce = inNonce, nil
		case state == inNonce:
			if nonce = append(nonce, b); len(nonce) == NonceLen {
				r.begin(nonce)
				state = inSession
			}
		case state == inSession:
			r.data([]byte{b})
		}
	}
	return r.String()
}

func FuzzMatcher(f *testing.F) {
	f.Add([]byte("aab"), []byte("aaaab"))
	f.Add([]byte("abab"), []byte("abaabab"))
	f.Fuzz(func(t *testing.T, pattern, in []byte) {
		if len(pattern) == 0 {
			return
		}
		m := newMatcher(pattern)
		end, found := m.scan(in)
		i := bytes.Index(in, pattern)
		if found != (i >= 0) || found && end != i+len(pattern) {
			t.Fatalf("%q in %q: %d %v, want %d", pattern, in, end, found, i)
		}
	})
}

func FuzzReadFrame(f *testing.F) {
	var good bytes.Buffer
	WriteFrame(&good, KindStdout, []byte("hello"))
	f.Add(good.Bytes())
	f.Add(good.Bytes()[:7])
	f.Add([]byte{17, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{17, 0, 1, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		kind, payload, err := ReadFrame(bytes.NewReader(in), make([]byte, 8))
		switch {
		case len(in) == 0:
			if err != io.EOF {
				t.Fatalf("nothing to read: %v", err)
			}
		case err != nil:
		case int(binary.BigEndian.Uint32(in[1:])) != len(payload) || len(payload) > MaxPayload || kind != Kind(in[0]):
			t.Fatalf("kind %d, %d bytes", kind, len(payload))
		default:
			var out bytes.Buffer
			if err := WriteFrame(&out, kind, payload); err != nil || !bytes.HasPrefix(in, out.Bytes()) {
				t.Fatalf("does not come back: %v", err)
			}
		}
		// What came across a border is passed on in bounds, or not at all.
		if err == nil {
			if out, err := Sanitize(kind, payload); err == nil && len(out) > MaxPayload {
				t.Fatalf("grew to %d bytes", len(out))
			}
		}
	})
}
