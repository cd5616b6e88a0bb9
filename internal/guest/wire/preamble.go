package wire

import "bytes"

// matcher finds a pattern in a stream, however the stream is cut into pieces
// (Knuth, Morris and Pratt, "Fast pattern matching in strings", 1977).
type matcher struct {
	pattern []byte
	// border[k] is the length of the longest proper prefix of pattern[:k] that is
	// also its suffix.
	border []int
	// n is the length of the longest prefix of pattern that the stream ends with.
	n int
}

func newMatcher(pattern []byte) *matcher {
	m := &matcher{pattern: pattern, border: make([]int, len(pattern)+1)}
	for k, n := 1, 0; k < len(pattern); k++ {
		for n > 0 && pattern[n] != pattern[k] {
			n = m.border[n]
		}
		if pattern[n] == pattern[k] {
			n++
		}
		m.border[k+1] = n
	}
	return m
}

// next takes one byte and reports whether the pattern ends with it.
func (m *matcher) next(b byte) bool {
	if m.n == len(m.pattern) {
		m.n = m.border[m.n]
	}
	for m.n > 0 && m.pattern[m.n] != b {
		m.n = m.border[m.n]
	}
	if m.pattern[m.n] == b {
		m.n++
	}
	return m.n == len(m.pattern)
}

// scan takes bytes of p up to the end of the pattern, or all of them. end is the
// number of bytes taken.
func (m *matcher) scan(p []byte) (end int, found bool) {
	for i := 0; i < len(p); i++ {
		if m.n == 0 {
			skip := bytes.IndexByte(p[i:], m.pattern[0])
			if skip < 0 {
				return len(p), false
			}
			i += skip
		}
		if m.next(p[i]) {
			return i + 1, true
		}
	}
	return len(p), false
}

// sink is what a demux finds in a stream.
type sink interface {
	data(p []byte)      // of the session, valid during the call
	drop()              // a magic: the session is over
	begin(nonce []byte) // and its nonce: a new one begins
}

// demux takes apart the bytes that a guest reads: sessions, and the preambles
// between them. The magic is looked for in every byte, those of a nonce and of a
// half preamble included: a host may die in the middle of its preamble.
type demux struct {
	magic *matcher
	out   sink
	state demuxState
	nonce []byte
	// held is how many bytes of the session, the last ones read, are kept back
	// because they could begin a magic. They are the end of magic.pattern[:magic.n].
	held int
}

type demuxState int

const (
	noSession demuxState = iota
	inNonce
	inSession
)

func newDemux(magic []byte, out sink) *demux {
	return &demux{magic: newMatcher(magic), out: out}
}

// feed takes the bytes of one read.
func (d *demux) feed(p []byte) {
	for len(p) > 0 {
		if d.state == inNonce {
			p = p[d.feedNonce(p):]
			continue
		}
		n, held := d.magic.n, d.held
		end, found := d.magic.scan(p)
		switch {
		case found:
			// What came just before the magic goes the way of its session.
			d.held, d.state, d.nonce = 0, inNonce, d.nonce[:0]
			d.out.drop()
		case d.state == inSession:
			total := held + end
			d.held = min(d.magic.n, total)
			ready := total - d.held
			fromHeld := min(held, ready)
			d.out.data(d.magic.pattern[n-held : n-held+fromHeld])
			d.out.data(p[:ready-fromHeld])
		}
		p = p[end:]
	}
}

// feedNonce takes bytes of a nonce and returns how many.
func (d *demux) feedNonce(p []byte) int {
	for i, b := range p {
		if d.magic.next(b) {
			d.nonce = d.nonce[:0]
			d.out.drop()
			continue
		}
		d.nonce = append(d.nonce, b)
		if len(d.nonce) == NonceLen {
			d.state = inSession
			d.out.begin(d.nonce)
			return i + 1
		}
	}
	return len(p)
}

// flush delivers what is held back. A magic is still found when its rest comes.
func (d *demux) flush() {
	if d.held > 0 {
		n := d.magic.n
		d.out.data(d.magic.pattern[n-d.held : n])
		d.held = 0
	}
}
