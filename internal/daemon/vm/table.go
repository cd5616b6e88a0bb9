package vm

import (
	"context"
	"fmt"
	"time"
)

// scope says how long a resource is held.
type scope int

const (
	scopeVM  scope = iota // from create to delete; survives the host's boot
	scopeRun              // from start to stop; dies with the host's boot
)

// A resource is one thing on the host that a VM holds.
//
// release frees what the machine's handles record, derives the name where they
// have none, and treats "absent" as success: it serves stop, rollback, delete and
// crash recovery alike. It must not depend on a successful write: a full disk must
// be able to free itself.
type resource struct {
	name      string // shown as progress and in errors
	scope     scope
	preflight func(ctx context.Context, v *machine) error // optional: fails before anything is acquired
	acquire   func(ctx context.Context, v *machine) error
	release   func(ctx context.Context, v *machine) error
}

// table is everything that a VM holds on the host, in the order of acquiring.
// Delete releases record.json before the disk, so that a disk without a row and
// without record.json is never taken for a VM.
func (m *Manager) table() []resource {
	return []resource{
		{"directory", scopeVM, nil, m.acquireDirectory, m.releaseDirectory},
		{"disk", scopeVM, m.preflightRoom, m.acquireDisk, m.releaseDisk},
		{"record", scopeVM, nil, m.acquireRecord, m.releaseRecord},

		{"run directory", scopeRun, nil, m.acquireRunDir, m.releaseRunDir},
		{"disk attachment", scopeRun, nil, m.acquireAttachment, m.releaseAttachment},
		{"boot files", scopeRun, m.preflightBootFiles, m.acquireBootFiles, m.releaseBootFiles},
		{"network", scopeRun, m.preflightNetwork, m.acquireNetwork, m.releaseNetwork},
		{"jail", scopeRun, nil, m.acquireJail, m.releaseJail},
		{"process", scopeRun, m.preflightProcess, m.acquireProcess, m.releaseProcess},
		{"agent", scopeRun, nil, m.acquireAgent, m.releaseAgent},
	}
}

// rows returns the rows of one scope.
func (m *Manager) rows(sc scope) []resource {
	var rows []resource
	for _, r := range m.table() {
		if r.scope == sc {
			rows = append(rows, r)
		}
	}
	return rows
}

// undoTimeout bounds a rollback, which goes on after its operation was cancelled.
const undoTimeout = 60 * time.Second

// undoContext is for work that must be done although ctx has ended.
func undoContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
}

// acquireAll acquires the rows of one scope in order. When one fails, that row and
// those before it are released again: acquire may have half happened. err is why
// it failed; stuck is what could not be released, nil after a clean rollback.
func (m *Manager) acquireAll(ctx context.Context, v *machine, sc scope, s steps) (err, stuck error) {
	rows := m.rows(sc)
	for _, r := range rows {
		if r.preflight != nil {
			if err := r.preflight(ctx, v); err != nil {
				return err, nil
			}
		}
	}
	for k, r := range rows {
		s.step(r.name)
		if err := m.acquireRow(ctx, v, r, s.verb); err != nil {
			undo, cancel := undoContext(ctx)
			defer cancel()
			return err, m.releaseRows(undo, v, rows[:k+1], s.verb)
		}
	}
	return nil, nil
}

// acquireRow acquires and records what is held. No intent is written before: a release
// derives what it needs, see docs/decisions/005.
func (m *Manager) acquireRow(ctx context.Context, v *machine, r resource, verb string) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if err := m.at(verb, r.name, "acquire", "before"); err != nil {
		return err
	}
	if err := r.acquire(ctx, v); err != nil {
		return err
	}
	if err := m.at(verb, r.name, "acquire", "effect"); err != nil {
		return err
	}
	if r.scope == scopeRun {
		if err := m.saveHandles(v); err != nil {
			return err
		}
	}
	return m.at(verb, r.name, "acquire", "record")
}

// releaseAll releases the rows of one scope in reverse. It stops at the first that
// cannot be released: what lies below may still be in use by it, and a disk is not
// removed under a process that did not die.
func (m *Manager) releaseAll(ctx context.Context, v *machine, sc scope, verb string) error {
	return m.releaseRows(ctx, v, m.rows(sc), verb)
}

func (m *Manager) releaseRows(ctx context.Context, v *machine, rows []resource, verb string) error {
	for k := len(rows) - 1; k >= 0; k-- {
		r := rows[k]
		err := m.at(verb, r.name, "release", "before")
		if err == nil {
			err = r.release(ctx, v)
		}
		if err == nil {
			err = m.at(verb, r.name, "release", "effect")
		}
		if err != nil {
			return fmt.Errorf("cannot release %s: %w", r.name, err)
		}
	}
	return nil
}

// steps numbers the rows that one operation goes through, for its progress.
type steps struct {
	verb     string
	progress Progress
	done     *int
	total    int
}

func (m *Manager) steps(verb string, p Progress, total int) steps {
	return steps{verb: verb, progress: p, done: new(int), total: total}
}

func (s steps) step(name string) {
	*s.done++
	s.progress.Step(*s.done, s.total, name)
}

// at is where tests stop an operation: before a row is touched, after it took
// effect, after it was recorded. The hook is nil outside of tests.
func (m *Manager) at(verb, row, what, when string) error {
	if m.hook == nil {
		return nil
	}
	return m.hook(verb + "/" + row + "/" + what + "/" + when)
}
