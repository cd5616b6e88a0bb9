// Package store keeps the daemon's records in SQLite, and is the only package that
// knows SQL. What must hold always is a constraint of the database: a name, a slot
// and a repository belong to one VM, an image or kernel that a VM was made from
// cannot be deleted, a workspace goes with its VM. A change of state is a
// compare-and-set, on disk (synchronous=FULL) when Transition returns. The store
// has no clock and makes no identifiers: what it keeps comes from the caller.
//
// Nothing here describes what a running VM holds on the host: that is handles.json.
//
// One connection writes, a few others read. A write that frees something (a delete,
// or a Transition) may use the reserve, a file of 2 MiB beside the database that is
// given up when the disk is full, so that a full disk can always free itself.
package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/pressly/goose/v3"
	_ "modernc.org/sqlite" // the database/sql driver
)

//go:embed migrations/*.sql
var migrations embed.FS

// readers is the size of the read pool.
const readers = 4

// Store is the open database.
type Store struct {
	path    string
	writer  *sql.DB // one connection
	reader  *sql.DB
	reserve *reserve
}

// Open opens the database at path, an absolute path in a directory of the daemon's
// own, makes it when it is not there and brings its schema up to date. Its error is
// an ErrNewer for a database of a newer release, and an ErrFull when the disk is so
// full that not even giving up the reserve helped.
func Open(ctx context.Context, path string) (*Store, error) {
	s := &Store{path: path, reserve: newReserve(path + ".reserve")}
	err := s.open(ctx)
	for errors.Is(err, ErrFull) && s.reserve.release() {
		err = s.open(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open the database %s: %w", path, err)
	}
	s.reserve.renew()
	return s, nil
}

func (s *Store) open(ctx context.Context) (err error) {
	// SQLite gives the files beside the database its mode.
	f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return full(err)
	}
	f.Close()
	defer func() {
		if err != nil {
			s.closeDB()
			err = s.wrap(err)
		}
	}()
	// A small write-ahead log: what the reserve gives back is enough to go once around it.
	const common = "_pragma=busy_timeout(5000)&_pragma=foreign_keys(1)&_pragma=synchronous(2)"
	s.writer, err = sql.Open("sqlite", dsn(s.path, common+"&_pragma=journal_mode(WAL)&_pragma=wal_autocheckpoint(128)&_txlock=immediate"))
	if err != nil {
		return err
	}
	s.writer.SetMaxOpenConns(1)
	if err := s.migrate(ctx); err != nil {
		return err
	}
	s.reader, err = sql.Open("sqlite", dsn(s.path, common+"&_pragma=query_only(1)"))
	if err != nil {
		return err
	}
	s.reader.SetMaxOpenConns(readers)
	s.reader.SetMaxIdleConns(readers)
	return s.reader.PingContext(ctx)
}

// dsn is the URI form, so that no character of path means anything.
func dsn(path, query string) string {
	return (&url.URL{Scheme: "file", Path: filepath.ToSlash(path), RawQuery: query}).String()
}

func (s *Store) migrate(ctx context.Context) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, s.writer, files)
	if err != nil {
		return err
	}
	have, known, err := p.GetVersions(ctx)
	if err != nil {
		return err
	}
	if have > known {
		return fmt.Errorf("%w: its schema is %d, this release knows %d", ErrNewer, have, known)
	}
	_, err = p.Up(ctx)
	return err
}

// Close closes the database after the calls under way have ended.
func (s *Store) Close() error { return s.closeDB() }

func (s *Store) closeDB() error {
	var errs []error
	// The writer last: the last connection folds the write-ahead log into the database.
	for _, db := range []*sql.DB{s.reader, s.writer} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	s.reader, s.writer = nil, nil
	return errors.Join(errs...)
}

// use says what a write is for.
type use bool

const (
	grows use = false // leaves the reserve alone
	frees use = true  // may use up the reserve
)

// write runs fn in a transaction that holds the write lock from its beginning, and
// commits when fn returns nil. fn may run more than once.
func (s *Store) write(ctx context.Context, u use, fn func(tx *sql.Tx) error) error {
	err := s.writeOnce(ctx, fn)
	for u == frees && errors.Is(err, ErrFull) && s.reserve.release() {
		err = s.writeOnce(ctx, fn)
	}
	if err == nil {
		s.reserve.renew()
	}
	return err
}

func (s *Store) writeOnce(ctx context.Context, fn func(tx *sql.Tx) error) error {
	tx, err := s.writer.BeginTx(ctx, nil)
	if err != nil {
		return s.wrap(err)
	}
	if err := fn(tx); err != nil {
		tx.Rollback() // fails only when SQLite has rolled back already
		return s.wrap(err)
	}
	return s.wrap(tx.Commit())
}

// scanner is a *sql.Row or *sql.Rows.
type scanner interface{ Scan(dest ...any) error }

// querier is a *sql.DB or *sql.Tx.
type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// one reads one row; what names it in ErrNotFound.
func one[T any](ctx context.Context, q querier, what string, scan func(scanner) (T, error), query string, args ...any) (T, error) {
	v, err := scan(q.QueryRowContext(ctx, query, args...))
	if errors.Is(err, sql.ErrNoRows) {
		return v, fmt.Errorf("%s: %w", what, ErrNotFound)
	}
	return v, err
}

// all reads all rows, nil for none.
func all[T any](ctx context.Context, q querier, scan func(scanner) (T, error), query string, args ...any) ([]T, error) {
	rows, err := q.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []T
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	return list, rows.Err()
}

// counts reads rows of a name and a number.
func (s *Store) counts(ctx context.Context, query string) (map[string]int, error) {
	rows, err := s.reader.QueryContext(ctx, query)
	if err != nil {
		return nil, s.wrap(err)
	}
	defer rows.Close()
	m := make(map[string]int)
	for rows.Next() {
		var name string
		var n int
		if err := rows.Scan(&name, &n); err != nil {
			return nil, s.wrap(err)
		}
		m[name] = n
	}
	return m, s.wrap(rows.Err())
}

func fromTime(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func toTime(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}
