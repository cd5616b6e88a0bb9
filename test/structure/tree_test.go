// Package structure holds the rules of docs/layout.md as tests: which package may
// import which, what may be a package-level variable, who may start a process, what
// package daemon exports, and how long files and functions get. It reads the source;
// it needs nothing built. Each rule is a function over parsed source, tried on
// examples that break it, so that a rule that finds nothing is known to look. Beside them
// it tries the Makefile without a Go.
package structure

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// root is the top of the repository.
func root() string { return filepath.Join("..", "..") }

// module is the path of the Go module.
const module = "banger"

// goPackage is what the rules need of the output of go list.
type goPackage struct {
	ImportPath string
	Imports    []string // of files that are no tests
}

// packages lists the module's packages, without the module's name.
func packages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-e", "-json=ImportPath,Imports", "./...")
	cmd.Dir = root()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	var list []goPackage
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		p.ImportPath = strings.TrimPrefix(p.ImportPath, module+"/")
		list = append(list, p)
	}
	if len(list) < 20 {
		t.Fatalf("go list finds only %d packages", len(list))
	}
	return list
}

// source is one parsed Go file.
type source struct {
	path      string // below root
	pkg       string // the directory
	fset      *token.FileSet
	file      *ast.File
	test      bool
	generated bool
}

func parse(path string, text any) (source, error) {
	s := source{path: path, pkg: filepath.Dir(path), fset: token.NewFileSet(), test: strings.HasSuffix(path, "_test.go")}
	var err error
	s.file, err = parser.ParseFile(s.fset, filepath.Join(root(), path), text, parser.ParseComments)
	if err == nil {
		s.generated = ast.IsGenerated(s.file)
	}
	return s, err
}

// at says where a node is.
func (s source) at(n ast.Node) string {
	p := s.fset.Position(n.Pos())
	p.Filename = s.path
	return p.String()
}

// example parses a file that exists only in a test.
func example(t *testing.T, path, text string) source {
	t.Helper()
	s, err := parse(path, text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// eachFile calls f with the path below root of every file of the repository but
// those that git and the build keep for themselves.
func eachFile(t *testing.T, f func(path string)) {
	t.Helper()
	err := filepath.WalkDir(root(), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root(), path)
		if err != nil {
			return err
		}
		if d.IsDir() && (rel == ".git" || rel == filepath.Join("cmd", "bangerd", "programs") || rel == "dist" || rel == "bin") {
			return filepath.SkipDir
		}
		if d.Type().IsRegular() {
			f(rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// sources parses all Go files that people wrote, tests included.
func sources(t *testing.T) []source {
	t.Helper()
	var list []source
	eachFile(t, func(path string) {
		if !strings.HasSuffix(path, ".go") || strings.Contains(path, "testdata"+string(filepath.Separator)) {
			return
		}
		s, err := parse(path, nil)
		if err != nil {
			t.Error(err)
			return
		}
		if !s.generated {
			list = append(list, s)
		}
	})
	if len(list) < 50 {
		t.Fatalf("only %d Go files", len(list))
	}
	return list
}

// report fails the test with one line per finding.
func report(t *testing.T, findings []string) {
	t.Helper()
	for _, f := range findings {
		t.Error(f)
	}
}
