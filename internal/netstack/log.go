package netstack

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"banger/internal/guest/wire"
	"banger/internal/netwire"
)

// The bounds of the log. A guest decides how much is refused, so it must not decide how
// much is written or remembered.
const (
	logWindow   = 5 * time.Second // alike entries within it become one line
	logRate     = 20              // lines per second,
	logBurst    = 100             // after as many at once
	logKeys     = 1024            // entries remembered
	logQueue    = 256             // lines that wait for the disk
	logField    = 300             // bytes of a text
	logFileSize = 512 << 10       // bytes of a file
	logTick     = 250 * time.Millisecond
	logGoodbye  = 2 * time.Second // what close waits for the disk
)

// logSkipped is the reason of the line that counts what was not written.
const logSkipped = "further refusals were not written"

// refusalLog writes the refusals to netwire.LogFile. The first of its kind is written at
// once, those like it are counted and written as one line when the window ends. Its
// caller never waits for the disk: a goroutine writes, and what it cannot keep up with is
// counted. While nothing is refused nothing wakes.
type refusalLog struct {
	dir   string
	total atomic.Int64
	wake  chan struct{} // of capacity 1: there are lines, or the end
	done  chan struct{} // closed when the writer has ended

	mu      sync.Mutex
	recent  map[refusalKey]*refusal
	skipped refusal
	lines   []netwire.Entry // the writer's
	tokens  float64
	filled  time.Time
	timer   *time.Timer // nil while no count waits for its window to end
	fires   time.Time
	closed  bool
}

type refusalKey struct{ protocol, target, name, reason string }

// refusal is a window, with those that came after the line that began it.
type refusal struct {
	last  netwire.Entry
	count int64
	ends  time.Time
}

// newLog makes the log of the VM in dir. It never fails: a log that cannot be written
// costs its lines only.
func newLog(dir string) *refusalLog {
	l := &refusalLog{
		dir: dir, wake: make(chan struct{}, 1), done: make(chan struct{}),
		recent: make(map[refusalKey]*refusal), tokens: logBurst, filled: time.Now(),
	}
	go l.write()
	return l
}

// refused is how many refusals were added, written or not.
func (l *refusalLog) refused() int64 { return l.total.Load() }

// add counts e, once or as often as it says, if it is no event, and writes it if the
// bounds allow.
func (l *refusalLog) add(e netwire.Entry) {
	e.Count = max(e.Count, 1)
	if e.Event == "" {
		l.total.Add(e.Count)
	}
	for _, text := range []*string{&e.Protocol, &e.Target, &e.Name, &e.Reason, &e.Rule, &e.Hint, &e.Event} {
		*text = cleanField(*text)
	}
	now := time.Now()
	if e.At.IsZero() {
		e.At = now
	}
	key := refusalKey{e.Protocol, e.Target, e.Name, e.Reason}

	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	if r := l.recent[key]; r != nil && (r.count > 0 || now.Before(r.ends)) {
		r.last = e
		r.count += e.Count
		l.armLocked(now, r.ends)
		return
	}
	if !l.rememberLocked(now) || len(l.lines) >= logQueue || !l.takeLocked(now) {
		if l.skipped.count == 0 {
			l.skipped.ends = now.Add(logWindow)
		}
		l.skipped.count += e.Count
		l.armLocked(now, l.skipped.ends)
		return
	}
	l.recent[key] = &refusal{ends: now.Add(logWindow)}
	l.queueLocked(e)
}

// cleanField makes a text that a guest may have chosen one line of bounded length.
func cleanField(s string) string {
	if len(s) > 2*logField {
		s = strings.Clone(s[:2*logField])
	}
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		return r
	}, wire.CleanText(s, logField))
}

// rememberLocked says whether there is room for one more window. Those that are over go
// when the table is full: the rate leaves few that are not, so this is rare.
func (l *refusalLog) rememberLocked(now time.Time) bool {
	if len(l.recent) < logKeys {
		return true
	}
	for key, r := range l.recent {
		if r.count == 0 && !now.Before(r.ends) {
			delete(l.recent, key)
		}
	}
	return len(l.recent) < logKeys
}

// takeLocked takes the right to write a line.
func (l *refusalLog) takeLocked(now time.Time) bool {
	l.tokens = min(logBurst, l.tokens+logRate*now.Sub(l.filled).Seconds())
	l.filled = now
	if l.tokens < 1 {
		return false
	}
	l.tokens--
	return true
}

func (l *refusalLog) queueLocked(e netwire.Entry) {
	l.lines = append(l.lines, e)
	l.signal()
}

func (l *refusalLog) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// armLocked has tick run at the time at, or earlier. Ticks keep a distance, so that a
// thousand windows do not mean a thousand of them.
func (l *refusalLog) armLocked(now, at time.Time) {
	if earliest := now.Add(logTick); at.Before(earliest) {
		at = earliest
	}
	switch {
	case l.timer == nil:
		l.timer = time.AfterFunc(at.Sub(now), l.tick)
	case at.Before(l.fires):
		l.timer.Reset(at.Sub(now))
	default:
		return
	}
	l.fires = at
}

func (l *refusalLog) tick() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.timer = nil
	l.flushLocked(time.Now(), false)
}

// flushLocked writes the counts whose window is over, or all, and arms the timer for
// those that must wait.
func (l *refusalLog) flushLocked(now time.Time, all bool) {
	var waiting []*refusal
	for _, r := range l.recent {
		if r.count > 0 {
			waiting = append(waiting, r)
		}
	}
	slices.SortFunc(waiting, func(a, b *refusal) int { return a.last.At.Compare(b.last.At) })
	for _, r := range waiting {
		if !all && now.Before(r.ends) {
			l.armLocked(now, r.ends)
			continue
		}
		if !all && (len(l.lines) >= logQueue || !l.takeLocked(now)) {
			l.armLocked(now, now)
			continue
		}
		r.last.Count = r.count
		l.queueLocked(r.last)
		r.count, r.ends = 0, now.Add(logWindow)
	}
	switch r := &l.skipped; {
	case r.count == 0:
	case !all && now.Before(r.ends):
		l.armLocked(now, r.ends)
	default:
		// One line in a window needs no right to be written.
		l.queueLocked(netwire.Entry{At: now, Reason: logSkipped, Count: r.count})
		r.count = 0
	}
}

// close writes what waits and ends the log.
func (l *refusalLog) close() {
	l.mu.Lock()
	if !l.closed {
		l.flushLocked(time.Now(), true)
		l.closed = true
		if l.timer != nil {
			l.timer.Stop()
		}
	}
	l.mu.Unlock()
	l.signal()
	late := time.NewTimer(logGoodbye)
	defer late.Stop()
	select {
	case <-l.done:
	case <-late.C:
	}
}

// write is the goroutine that writes.
func (l *refusalLog) write() {
	defer close(l.done)
	for range l.wake {
		l.mu.Lock()
		lines, last := l.lines, l.closed
		l.lines = nil
		l.mu.Unlock()
		l.append(lines)
		if last {
			return
		}
	}
}

// append writes lines to the file, which it opens each time: whoever removes the log
// gets a new one. What the disk does not take is lost.
func (l *refusalLog) append(lines []netwire.Entry) {
	if len(lines) == 0 {
		return
	}
	f, size, torn, err := l.open()
	if err != nil {
		return
	}
	defer func() { f.Close() }()
	for _, e := range lines {
		data, err := json.Marshal(e)
		if err != nil {
			continue
		}
		data = append(data, '\n')
		if size+int64(len(data)) > logFileSize {
			l.rotate()
			f.Close()
			if f, size, torn, err = l.open(); err != nil || size+int64(len(data)) > logFileSize {
				return
			}
		}
		if torn {
			data = append([]byte{'\n'}, data...)
		}
		n, _ := f.Write(data)
		size += int64(n)
		if n > 0 {
			torn = data[n-1] != '\n'
		}
	}
}

// open opens the file and says whether its last line lacks its end: a full disk or a
// killed process leave such.
func (l *refusalLog) open() (f *os.File, size int64, torn bool, err error) {
	const flags = os.O_RDWR | os.O_APPEND | os.O_CREATE | syscall.O_NOFOLLOW | syscall.O_NONBLOCK
	f, err = os.OpenFile(filepath.Join(l.dir, netwire.LogFile), flags, 0o600)
	if err != nil {
		return nil, 0, false, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fs.ErrInvalid
	}
	if err != nil {
		return nil, 0, false, errors.Join(err, f.Close())
	}
	if size = info.Size(); size > 0 {
		var end [1]byte
		n, _ := f.ReadAt(end[:], size-1)
		torn = n == 1 && end[0] != '\n'
	}
	return f, size, torn, nil
}

// rotate begins a new file. A full one that cannot be moved away is emptied: the bound
// counts more than old lines.
func (l *refusalLog) rotate() {
	path := filepath.Join(l.dir, netwire.LogFile)
	if os.Rename(path, filepath.Join(l.dir, netwire.LogOld)) != nil {
		os.Truncate(path, 0)
	}
}
