package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"banger/internal/daemon/store"
	"banger/internal/guest/wire"
	"banger/internal/netwire"
)

const (
	logPoll = 250 * time.Millisecond
	// logLine bounds a line, logField a text in it, in bytes. What banger-net writes is
	// shorter.
	logLine  = 64 << 10
	logField = 1 << 10
)

// NetworkLog hands on what the network of a VM refused, oldest first. With follow it goes
// on until ctx ends, send fails, or the record is gone.
func (m *Manager) NetworkLog(ctx context.Context, ref string, follow bool, send func(netwire.Entry) error) error {
	rec, err := m.Resolve(ctx, ref, true)
	if err != nil {
		return err
	}
	r := networkLog{dir: m.layout.VM(rec.ID).Path(), send: send}
	defer r.close()
	if err := r.begin(); err != nil {
		return err
	}
	if !follow {
		return nil
	}
	tick := time.NewTicker(logPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
		if err := r.poll(); err != nil {
			return err
		}
		if _, err := m.store.VM(ctx, rec.ID); errors.Is(err, store.ErrNotFound) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// networkLog reads the two files of a VM's log as one that grows.
type networkLog struct {
	dir  string
	send func(netwire.Entry) error

	file *os.File // netwire.LogFile as it was when it was opened; nil without one
	at   int64    // how much of it was read
	line []byte   // the beginning of a line that is not whole yet
	skip bool     // that line is too long
}

func (r *networkLog) close() {
	if r.file != nil {
		r.file.Close()
	}
}

// begin reads all that there is.
func (r *networkLog) begin() error {
	// The newer half first: then a rotation in between loses nothing.
	if err := r.open(); err != nil {
		return err
	}
	old, err := os.Open(filepath.Join(r.dir, netwire.LogOld))
	if errors.Is(err, fs.ErrNotExist) {
		return r.read()
	}
	if err != nil {
		return err
	}
	newer := r.file
	if newer != nil && sameFile(newer, old) {
		newer.Close()
		newer = nil // poll opens what is there now
	}
	r.file = old
	err = r.read()
	old.Close()
	r.file, r.at, r.line, r.skip = newer, 0, nil, false
	if err != nil {
		return err
	}
	return r.poll()
}

// open takes the newest file; none is fine.
func (r *networkLog) open() error {
	f, err := os.Open(filepath.Join(r.dir, netwire.LogFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	r.file, r.at, r.line, r.skip = f, 0, nil, false
	return nil
}

// poll reads what came since. The file that was rotated away is read to its end first.
func (r *networkLog) poll() error {
	if err := r.read(); err != nil {
		return err
	}
	there, err := os.Stat(filepath.Join(r.dir, netwire.LogFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if r.file != nil {
		if opened, err := r.file.Stat(); err == nil && os.SameFile(opened, there) && there.Size() >= r.at {
			return nil
		}
		if err := r.read(); err != nil { // what was written just before the rotation
			return err
		}
		r.file.Close()
		r.file = nil
	}
	if err := r.open(); err != nil {
		return err
	}
	return r.read()
}

func sameFile(a, b *os.File) bool {
	x, err := a.Stat()
	if err != nil {
		return false
	}
	y, err := b.Stat()
	return err == nil && os.SameFile(x, y)
}

// read sends the whole lines from where it stands to the end.
func (r *networkLog) read() error {
	if r.file == nil {
		return nil
	}
	chunk := make([]byte, 32<<10)
	for {
		n, err := r.file.ReadAt(chunk, r.at)
		r.at += int64(n)
		if serr := r.take(chunk[:n]); serr != nil {
			return serr
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// take cuts what was read into lines.
func (r *networkLog) take(data []byte) error {
	for {
		part, rest, whole := bytes.Cut(data, []byte("\n"))
		if len(r.line)+len(part) > logLine {
			r.line, r.skip = nil, true
		}
		if !r.skip {
			r.line = append(r.line, part...)
		}
		if !whole {
			return nil
		}
		var e netwire.Entry
		if !r.skip && json.Unmarshal(r.line, &e) == nil && e.Reason != "" {
			for _, text := range []*string{&e.Protocol, &e.Target, &e.Name, &e.Reason, &e.Rule, &e.Hint, &e.Event} {
				*text = wire.CleanText(*text, logField)
			}
			if err := r.send(e); err != nil {
				return err
			}
		}
		r.line, r.skip, data = r.line[:0], false, rest
	}
}
