package main

import (
	"context"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// testPackage is one package with tests for the test host.
type testPackage struct {
	dir  string // below the tree
	path string // for go
	run  string // which tests, for -test.run
}

func (p testPackage) binary() string { return strings.ReplaceAll(p.dir, "/", "-") + ".test" }

// findTests gives the tests of a package that are for the test host: those that call
// need.Need with what, themselves or through functions of their test files.
func findTests(dir, what string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		return nil, err
	}
	calls := make(map[string][]string) // function → names that it mentions
	needs := make(map[string]bool)
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		for _, d := range file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(f, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.Ident:
					calls[f.Name.Name] = append(calls[f.Name.Name], n.Name)
				case *ast.CallExpr:
					if isNeed(n, what) {
						needs[f.Name.Name] = true
					}
				}
				return true
			})
		}
	}
	for changed := true; changed; { // at most once per function
		changed = false
		for f, names := range calls {
			if !needs[f] && slices.ContainsFunc(names, func(n string) bool { return needs[n] }) {
				needs[f], changed = true, true
			}
		}
	}
	var tests []string
	for f := range needs {
		if strings.HasPrefix(f, "Test") && f != "TestMain" {
			tests = append(tests, f)
		}
	}
	slices.Sort(tests)
	return tests, nil
}

// isNeed tells need.Need(t, what).
func isNeed(c *ast.CallExpr, what string) bool {
	s, ok := c.Fun.(*ast.SelectorExpr)
	if !ok || s.Sel.Name != "Need" || len(c.Args) != 2 {
		return false
	}
	l, ok := c.Args[1].(*ast.BasicLit)
	return ok && l.Value == strconv.Quote(what)
}

// findPackages looks for tests that need what, in the packages that go knows by these
// names; run, if not empty, takes the place of what was found.
func findPackages(ctx context.Context, tree string, names []string, what, run string) ([]testPackage, error) {
	list := exec.CommandContext(ctx, "go", append([]string{"list", "-f", "{{.Dir}} {{.ImportPath}}"}, names...)...)
	list.Dir, list.Stderr = tree, os.Stderr
	out, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("cannot list packages: %w", err)
	}
	var found []testPackage
	for line := range strings.Lines(string(out)) {
		at := strings.LastIndexByte(line, ' ')
		dir, err := filepath.Rel(tree, line[:at])
		if err != nil {
			return nil, err
		}
		p := testPackage{dir: dir, path: strings.TrimSpace(line[at:]), run: run}
		tests, err := findTests(line[:at], what)
		if err != nil {
			return nil, err
		}
		if len(tests) == 0 && (run == "" || slices.Contains(names, "./...")) {
			continue
		}
		if run == "" {
			p.run = "^(" + strings.Join(tests, "|") + ")$"
		}
		found = append(found, p)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("cannot find a test that needs %s in %s", what, strings.Join(names, " "))
	}
	return found, nil
}

// compile makes the test binaries in dir.
func compile(ctx context.Context, tree, dir string, packages []testPackage) error {
	for _, p := range packages {
		c := exec.CommandContext(ctx, "go", "test", "-c", "-o", filepath.Join(dir, p.binary()), p.path)
		c.Dir, c.Stdout, c.Stderr = tree, os.Stderr, os.Stderr
		c.Env = append(os.Environ(), "CGO_ENABLED=0")
		if err := c.Run(); err != nil {
			return fmt.Errorf("cannot compile the tests of %s: %w", p.path, err)
		}
		if _, err := os.Stat(filepath.Join(dir, p.binary())); os.IsNotExist(err) {
			return fmt.Errorf("%s has no tests: %w", p.path, fs.ErrNotExist)
		}
	}
	return nil
}

// script runs all tests, also after a failure, and fails if one did.
func script(packages []testPackage, flags []string) string {
	var b strings.Builder
	b.WriteString("failed=0\n")
	for _, p := range packages {
		fmt.Fprintf(&b, "echo; echo '== %s'\ncd %s && /host/tests/%s -test.run %s", p.dir,
			quote("/host/tree/"+p.dir), p.binary(), quote(p.run))
		for _, f := range flags {
			b.WriteString(" " + quote(f))
		}
		fmt.Fprintf(&b, " || { echo 'FAIL %s'; failed=1; }\n", p.dir)
	}
	b.WriteString("exit $failed")
	return b.String()
}
