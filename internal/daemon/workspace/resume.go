package workspace

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// An interrupted prepare was to make the base next, and had written some of the files.
// What differs from the base then is not all the guest's doing. settle and torn tell
// what is the host's; both are changes of the base.

// settle finds the files that had been written: they have come in.
func settle(base, guest, next files) files {
	came := files{}
	for path := range union(base, next) {
		if n := next[path]; n != base[path] && n == guest[path] {
			came[path] = n
		}
	}
	return came
}

// mayBeTorn finds the files that git may have been about to write: it removes the old
// file, makes the new one and fills it.
func mayBeTorn(base, guest, next files) []string {
	var paths []string
	for path, n := range next {
		g := guest[path]
		isFile := n.mode == modeFile || n.mode == modeExecutable
		if n != base[path] && g != base[path] && g != n && (g == entry{} || isFile && g.mode != modeSymlink && g.mode != modeGitlink) {
			paths = append(paths, path)
		}
	}
	slices.Sort(paths)
	return paths
}

// maxTorn bounds the bytes of a file that is compared with what it was to become.
const maxTorn = 32 << 20

// resume finds what came in with an interrupted prepare. A file that is not there, or
// holds the first part of what it was to become, is the base of itself: no change of
// the guest's, and to be written anew.
func (r guestRepo) resume(ctx context.Context, base, guest, next files) (files, error) {
	came := settle(base, guest, next)
	for _, path := range mayBeTorn(base, guest, next) {
		g := guest[path]
		if (g == entry{}) {
			came[path] = g
			continue
		}
		torn, err := r.isPart(ctx, g.oid, next[path].oid)
		if err != nil {
			return nil, err
		}
		if torn {
			came[path] = g
		}
	}
	return came, nil
}

// isPart tells whether blob a is the first part of blob b.
func (r guestRepo) isPart(ctx context.Context, a, b string) (bool, error) {
	pair := a + "\n" + b + "\n"
	sizes, err := r.git(ctx, r.privateEnv(workIndex), strings.NewReader(pair), "cat-file", "--batch-check=%(objectsize)")
	if err != nil {
		return false, err
	}
	var sizeA, sizeB int64
	if _, err := fmt.Sscan(sizes, &sizeA, &sizeB); err != nil {
		return false, r.odd("cat-file", sizes)
	}
	if sizeA == 0 || sizeA >= sizeB || sizeB > maxTorn {
		return sizeA == 0 && sizeB > 0, nil
	}
	out, err := r.run(ctx, command{argv: []string{"git", "cat-file", "--batch=%(objectsize)"}, env: r.privateEnv(workIndex), dir: r.top, in: strings.NewReader(pair)})
	if err != nil {
		return false, err
	}
	in := bufio.NewReader(bytes.NewReader(out))
	contents := make([][]byte, 2)
	for i := range contents {
		if _, err := in.ReadString('\n'); err != nil {
			return false, err
		}
		contents[i] = make([]byte, []int64{sizeA, sizeB}[i])
		if _, err := io.ReadFull(in, contents[i]); err != nil {
			return false, err
		}
		if _, err := in.Discard(1); err != nil {
			return false, err
		}
	}
	return bytes.HasPrefix(contents[1], contents[0]), nil
}

// lasting are the changes of the base that came and more make. The content of a torn
// file is not kept.
func lasting(came, more, next files) files {
	changes := maps.Clone(came)
	for path, e := range changes {
		if e != next[path] {
			changes[path] = entry{}
		}
	}
	maps.Copy(changes, more)
	return changes
}
