package workspace

import (
	"maps"
	"slices"
	"strings"
)

// plan is what a prepare does, per path. A zero entry takes the file away.
type plan struct {
	write files    // in the working tree inside
	base  files    // in the base
	kept  []string // changed on both sides: left as they are inside, sorted
	stuck []string // cannot be written inside, sorted
	// behind are those of kept and stuck that were not changed inside, as they are there.
	behind files
	// changes counts the files that differ from the base when it is done, without
	// repositories inside the repository.
	changes int
}

// merge decides per path. blocked says that something inside that git ignores lies
// where the host has a new file, unread that what is there cannot be read inside: it
// counts as changed. stuck says that a file cannot be written inside.
//
// A path that is kept or stuck keeps its old base too, so that the difference base →
// guest stays what the guest did, and never undoes what the host did.
func merge(base, guest, host files, blocked, unread, stuck func(path string) bool) plan {
	p := plan{write: files{}, base: files{}, behind: files{}}
	for path := range union(base, host) {
		b, g, h := base[path], guest[path], host[path]
		switch {
		case h == b:
		case unread(path):
			p.kept = append(p.kept, path)
		case g == h:
			p.base[path] = h
		case g != b, g == entry{} && blocked(path):
			p.kept = append(p.kept, path)
		case stuck(path):
			p.stuck = append(p.stuck, path)
		default:
			p.write[path], p.base[path] = h, h
		}
	}
	p.yield(guest)
	slices.Sort(p.kept)
	slices.Sort(p.stuck)
	for _, path := range slices.Concat(p.kept, p.stuck) {
		if guest[path] == base[path] {
			p.behind[path] = base[path]
		}
	}
	p.count(base, guest)
	return p
}

// yield gives up what cannot be written because it would be a file where the guest
// has a folder, or the other way round.
func (p *plan) yield(guest files) {
	final := overlay(guest, p.write)
	atStuck := inTheWay(p.stuck)
	folders := map[string]bool{}
	for path := range final {
		for dir := range parents(path) {
			if folders[dir] {
				break
			}
			folders[dir] = true
		}
	}
	for path, e := range p.write {
		if (e == entry{}) {
			continue
		}
		clash := folders[path]
		for dir := range parents(path) {
			clash = clash || final[dir] != entry{}
		}
		if clash {
			delete(p.write, path)
			delete(p.base, path)
			if atStuck(path) {
				p.stuck = append(p.stuck, path)
			} else {
				p.kept = append(p.kept, path)
			}
		}
	}
}

func (p *plan) count(base, guest files) {
	newBase, final := overlay(base, p.base), overlay(guest, p.write)
	for path := range union(newBase, final) {
		if b, g := newBase[path], final[path]; b != g && b.mode != modeGitlink && g.mode != modeGitlink {
			p.changes++
		}
	}
}

// overlay is list with changes made to it; a zero entry is a deletion.
func overlay(list, changes files) files {
	out := maps.Clone(list)
	if out == nil {
		out = files{}
	}
	for path, e := range changes {
		if (e == entry{}) {
			delete(out, path)
		} else {
			out[path] = e
		}
	}
	return out
}

func union(a, b files) map[string]struct{} {
	all := make(map[string]struct{}, max(len(a), len(b)))
	for path := range a {
		all[path] = struct{}{}
	}
	for path := range b {
		all[path] = struct{}{}
	}
	return all
}

// parents are the folders above path, from the nearest on.
func parents(path string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for i := strings.LastIndexByte(path, '/'); i > 0; i = strings.LastIndexByte(path[:i], '/') {
			if !yield(path[:i]) {
				return
			}
		}
	}
}
