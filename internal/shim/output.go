package shim

import (
	"strconv"
	"strings"
	"sync"
	"syscall"
	"unicode/utf8"
)

const (
	consoleLimit  = 1 << 20 // of each of the two files, in bytes
	consoleTail   = 8 << 10
	stderrHead    = 16 << 10
	stderrTail    = 16 << 10
	exitStderr    = 4 << 10
	exitLines     = 20
	exitLineBytes = 512
	// intentPrefix is wire.IntentPrefix; a test compares them.
	intentPrefix = "banger-intent: "
)

// sink takes what the VMM writes and never says no: what cannot be written is
// dropped, because a VMM whose output nobody drains stands still.
type sink interface{ put(p []byte) }

// drain reads fd to its end, with blocking reads: two descriptors do not repay the
// memory of the runtime's poller.
func drain(fd int, into sink, buf []byte) {
	for {
		n, err := syscall.Read(fd, buf)
		if err == syscall.EINTR {
			continue
		}
		if n <= 0 || err != nil {
			return
		}
		into.put(buf[:n])
	}
}

// logFile is an append-only file that may fail at any time and is tried again at
// the next write.
type logFile struct {
	path string
	fd   int // -1: not open
	size int64
}

func (f *logFile) open(flags int) {
	fd, err := syscall.Open(f.path,
		syscall.O_WRONLY|syscall.O_CREAT|syscall.O_APPEND|syscall.O_CLOEXEC|syscall.O_NOFOLLOW|flags, 0o600)
	if err != nil {
		f.fd = -1
		return
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		syscall.Close(fd)
		f.fd = -1
		return
	}
	f.fd, f.size = fd, st.Size
}

func (f *logFile) close() {
	if f.fd >= 0 {
		syscall.Close(f.fd)
	}
	f.fd = -1
}

// write writes as much of p as goes.
func (f *logFile) write(p []byte) {
	for len(p) > 0 && f.fd >= 0 {
		n, err := syscall.Write(f.fd, p)
		if err == syscall.EINTR {
			continue
		}
		if n <= 0 || err != nil {
			return
		}
		f.size += int64(n)
		p = p[n:]
	}
}

// console is the bounded ring of two files, and the end of the output in memory:
// so that the end is known although the disk is full.
type console struct {
	mu    sync.Mutex
	limit int64
	old   string
	file  logFile
	end   tail
}

// newConsole goes on where the run before left off.
func newConsole(limit int64) *console {
	c := &console{limit: limit, old: consoleOld, file: logFile{path: consoleFile}, end: newTail(consoleTail)}
	c.file.open(0)
	return c
}

func (c *console) put(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.end.put(p)
	for len(p) > 0 {
		if c.file.fd < 0 {
			c.file.open(0)
		}
		if c.file.fd < 0 {
			return
		}
		if c.file.size >= c.limit {
			c.rotate()
		}
		n := min(int64(len(p)), c.limit-c.file.size)
		if c.file.fd < 0 || n <= 0 {
			return
		}
		c.file.write(p[:n])
		p = p[n:]
	}
}

// rotate begins a new file. When the full one cannot be moved away it is emptied:
// the bound holds in any case.
func (c *console) rotate() {
	c.file.close()
	_ = syscall.Rename(c.file.path, c.old)
	c.file.open(syscall.O_TRUNC)
}

func (c *console) last() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.end.bytes())
}

// stderrLog keeps the beginning of a standard error in the file as it comes, and the
// end of it at the end.
type stderrLog struct {
	mu    sync.Mutex
	file  logFile
	total int64
	end   tail
}

func newStderrLog(path string) *stderrLog {
	s := &stderrLog{file: logFile{path: path}, end: newTail(stderrTail)}
	s.file.open(syscall.O_TRUNC)
	return s
}

func (s *stderrLog) put(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if room := stderrHead - s.total; room > 0 {
		s.file.write(p[:min(int64(len(p)), room)])
	}
	s.total += int64(len(p))
	s.end.put(p)
}

// finish writes the end of the output and returns its last exitStderr bytes.
func (s *stderrLog) finish() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.end.bytes()
	if rest := s.total - stderrHead; rest > 0 {
		kept := all[max(0, int64(len(all))-rest):]
		if left := rest - int64(len(kept)); left > 0 {
			s.file.write([]byte("\n[" + strconv.FormatInt(left, 10) + " bytes left out]\n"))
		}
		s.file.write(kept)
	}
	s.file.close()
	return strings.ToValidUTF8(string(all[max(0, len(all)-exitStderr):]), "\uFFFD")
}

// tail keeps the last size bytes.
type tail struct {
	size int
	data []byte
}

// Twice the size, so that most writes move nothing.
func newTail(size int) tail { return tail{size: size, data: make([]byte, 0, 2*size)} }

func (t *tail) put(p []byte) {
	if len(p) > t.size {
		p = p[len(p)-t.size:]
	}
	if len(t.data)+len(p) > 2*t.size {
		n := copy(t.data, t.data[len(t.data)-t.size:])
		t.data = t.data[:n]
	}
	t.data = append(t.data, p...)
}

func (t *tail) bytes() []byte { return t.data[max(0, len(t.data)-t.size):] }

// lastLines takes the last lines of console output, without control characters,
// and the guest's intent, which is the last line that tells one.
func lastLines(text string) (lines []string, intent string) {
	all := strings.Split(text, "\n")
	for i := len(all) - 1; i >= 0 && len(lines) < exitLines; i-- {
		line := plain(all[i])
		if intent == "" {
			intent = intentOf(line)
		}
		if line != "" {
			lines = append(lines, line)
		}
	}
	for i, j := 0, len(lines)-1; i < j; i, j = i+1, j-1 {
		lines[i], lines[j] = lines[j], lines[i]
	}
	return lines, intent
}

// intentOf finds the intent also behind a prompt or the kernel's time stamp: the
// guest cannot know what stands in the line already.
func intentOf(line string) string {
	i := strings.LastIndex(line, intentPrefix)
	if i < 0 {
		return ""
	}
	switch verb := line[i+len(intentPrefix):]; verb {
	case "poweroff", "reboot", "halt", "failed":
		return verb
	}
	return ""
}

// plain drops escape sequences and control characters and bounds the length.
func plain(line string) string {
	var b strings.Builder
	for i := 0; i < len(line) && b.Len() < exitLineBytes; {
		if line[i] == 0x1b {
			i += escape(line[i:])
			continue
		}
		r, n := utf8.DecodeRuneInString(line[i:])
		i += n
		if r == '\t' || (r >= ' ' && r < 0x7f) || r >= 0xa0 {
			b.WriteRune(r)
		}
	}
	return strings.TrimRight(b.String(), " \t")
}

// escape is the length of the escape sequence (ECMA-48) that s, which starts with
// ESC, begins with. One that is cut off takes the rest.
func escape(s string) int {
	if len(s) < 2 {
		return len(s)
	}
	// A control sequence ends with its first byte of 0x40 to 0x7e, a string like a
	// window's title with BEL or ESC \, anything else after bytes of 0x20 to 0x2f.
	begin, final := 2, func(b byte) bool { return b >= 0x40 && b <= 0x7e }
	switch s[1] {
	case '[':
	case ']', 'P', 'X', '^', '_':
		final = func(b byte) bool { return b == 0x07 || b == 0x1b }
	default:
		begin, final = 1, func(b byte) bool { return b < 0x20 || b > 0x2f }
	}
	for i := begin; i < len(s); i++ {
		if final(s[i]) && s[i] == 0x1b {
			return i
		}
		if final(s[i]) {
			return i + 1
		}
	}
	return len(s)
}
