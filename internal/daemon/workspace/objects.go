package workspace

import (
	"compress/zlib"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// entry is a file in a tree: its mode as git writes it ("100644", "100755",
// "120000", "160000") and the name of its object. The zero entry is no file.
type entry struct {
	mode string
	oid  string
}

const (
	modeFile       = "100644"
	modeExecutable = "100755"
	modeSymlink    = "120000"
	modeGitlink    = "160000" // a commit of a submodule
)

// files are the entries of a tree by path, without folders.
type files map[string]entry

// format is the hash that a repository names its objects by.
type format string

func (f format) hash() hash.Hash {
	if f == "sha256" {
		return sha256.New()
	}
	return sha1.New()
}

// oid names an object, see gitformat-loose(5).
func (f format) oid(kind string, data []byte) string {
	h := f.hash()
	fmt.Fprintf(h, "%s %d\x00", kind, len(data))
	h.Write(data)
	return hex.EncodeToString(h.Sum(nil))
}

func (f format) emptyTree() string { return f.oid("tree", nil) }

// objectDir is a directory of loose objects that belongs to us. git itself does not
// write there: it sets the times of packs, also borrowed ones, that have an object
// already.
type objectDir struct {
	dir    string
	format format
}

func (o objectDir) path(oid string) string { return filepath.Join(o.dir, oid[:2], oid[2:]) }

// put writes an object and returns its name.
func (o objectDir) put(kind string, data []byte) (string, error) {
	oid := o.format.oid(kind, data)
	if _, err := os.Lstat(o.path(oid)); err == nil {
		return oid, nil
	}
	_, err := o.stream(kind, int64(len(data)), strings.NewReader(string(data)))
	return oid, err
}

// errShort says that a file became shorter or longer while it was read.
var errShort = errors.New("its size changed while it was read")

// stream writes an object of size bytes from r and returns its name: that of the
// bytes that were read, whatever was there before or after.
func (o objectDir) stream(kind string, size int64, r io.Reader) (string, error) {
	tmp, err := os.CreateTemp(o.dir, "tmp_obj_")
	if err != nil {
		return "", err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	h := o.format.hash()
	z, err := zlib.NewWriterLevel(tmp, zlib.BestSpeed)
	if err != nil {
		return "", err
	}
	w := io.MultiWriter(h, z)
	if _, err := fmt.Fprintf(w, "%s %d\x00", kind, size); err != nil {
		return "", err
	}
	if err := copyExactly(w, r, size); err != nil {
		return "", err
	}
	if err := z.Close(); err != nil {
		return "", err
	}
	if err := tmp.Close(); err != nil {
		return "", err
	}
	oid := hex.EncodeToString(h.Sum(nil))
	if err := os.MkdirAll(filepath.Dir(o.path(oid)), 0o700); err != nil {
		return "", err
	}
	return oid, os.Rename(tmp.Name(), o.path(oid))
}

// copyExactly copies size bytes, and wants r to end there.
func copyExactly(w io.Writer, r io.Reader, size int64) error {
	n, err := io.Copy(w, io.LimitReader(r, size))
	if err != nil {
		return err
	}
	if n < size {
		return errShort
	}
	var more [1]byte
	if n, _ := r.Read(more[:]); n > 0 {
		return errShort
	}
	return nil
}

// node is a folder while a tree is built.
type node struct {
	files   map[string]entry
	folders map[string]*node
}

func newNode() *node { return &node{files: map[string]entry{}, folders: map[string]*node{}} }

// putTree writes the trees that hold list and returns the name of the top one. Trees
// in known are there already.
func (o objectDir) putTree(list files, known map[string]bool) (string, error) {
	top := newNode()
	for path, e := range list {
		n := top
		parts := strings.Split(path, "/")
		for _, p := range parts[:len(parts)-1] {
			child := n.folders[p]
			if child == nil {
				child = newNode()
				n.folders[p] = child
			}
			n = child
		}
		n.files[parts[len(parts)-1]] = e
	}
	return o.putNode(top, "", known)
}

func (o objectDir) putNode(n *node, path string, known map[string]bool) (string, error) {
	// A folder sorts as if its name ended in "/".
	type item struct{ key, name, mode, oid string }
	items := make([]item, 0, len(n.files)+len(n.folders))
	for name, e := range n.files {
		if n.folders[name] != nil {
			return "", fmt.Errorf("%s is a file and a folder at once", visible(path+name))
		}
		items = append(items, item{name, name, e.mode, e.oid})
	}
	for name, child := range n.folders {
		oid, err := o.putNode(child, path+name+"/", known)
		if err != nil {
			return "", err
		}
		items = append(items, item{name + "/", name, "40000", oid})
	}
	slices.SortFunc(items, func(a, b item) int { return strings.Compare(a.key, b.key) })
	var data []byte
	for _, it := range items {
		raw, err := hex.DecodeString(it.oid)
		if err != nil || len(raw) != o.format.hash().Size() {
			return "", fmt.Errorf("%s has the malformed object name %q", visible(path+it.name), it.oid)
		}
		data = append(data, it.mode+" "+it.name+"\x00"...)
		data = append(data, raw...)
	}
	if oid := o.format.oid("tree", data); known[oid] {
		return oid, nil
	}
	return o.put("tree", data)
}
