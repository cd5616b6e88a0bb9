package structure

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	maxFile     = 600 // lines
	maxFunction = 80  // lines
)

// variables are the package-level variables that the rule below forbids and a
// reason allows, as "directory.name".
func variables() map[string]string {
	return map[string]string{}
}

// checkVariables finds package-level variables that could be changed. Allowed are
// error values, files embedded, regular expressions, arrays, and blank ones, which
// assert that a type has an interface. A map or slice belongs into a function.
func checkVariables(s source) (findings []string) {
	if s.test {
		return nil
	}
	for _, d := range s.file.Decls {
		gen, ok := d.(*ast.GenDecl)
		if !ok || gen.Tok != token.VAR {
			continue
		}
		for _, sp := range gen.Specs {
			spec := sp.(*ast.ValueSpec)
			if embeds(gen.Doc) || embeds(spec.Doc) {
				continue
			}
			for i, name := range spec.Names {
				if _, excepted := variables()[s.pkg+"."+name.Name]; excepted || name.Name == "_" {
					continue
				}
				var value ast.Expr
				if i < len(spec.Values) {
					value = spec.Values[i]
				}
				if !constant(name.Name, spec.Type, value) {
					findings = append(findings, fmt.Sprintf("%s: package-level variable %s", s.at(name), name.Name))
				}
			}
		}
	}
	return findings
}

// embeds tells a go:embed directive.
func embeds(doc *ast.CommentGroup) bool {
	return doc != nil && slices.ContainsFunc(doc.List, func(c *ast.Comment) bool { return strings.HasPrefix(c.Text, "//go:embed ") })
}

// constant tells a variable that nobody changes, by what it is made of.
func constant(name string, typ, value ast.Expr) bool {
	isError := strings.HasPrefix(name, "Err") || strings.HasPrefix(name, "err")
	if a, ok := typ.(*ast.ArrayType); ok && a.Len != nil && value != nil {
		return true
	}
	switch v := value.(type) {
	case *ast.CallExpr:
		switch called(v.Fun) {
		case "errors.New", "fmt.Errorf", "api.Errorf":
			return isError
		case "regexp.MustCompile":
			return true
		}
	case *ast.CompositeLit:
		a, ok := v.Type.(*ast.ArrayType)
		return ok && a.Len != nil
	case *ast.UnaryExpr:
		lit, ok := v.X.(*ast.CompositeLit)
		return ok && v.Op == token.AND && isError && strings.HasSuffix(called(lit.Type), "Error")
	}
	return false
}

// called writes a name or a selector, "" for anything else.
func called(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		if x, ok := e.X.(*ast.Ident); ok {
			return x.Name + "." + e.Sel.Name
		}
	}
	return ""
}

// starters are the packages that may start a process: the first three on the host,
// the others in the guest.
func starters() []string {
	return []string{"internal/daemon/hostcmd", "internal/daemon/proc", "internal/shim", "internal/guest/boot", "internal/guest/agent"}
}

// checkProcesses finds code that starts a process, or becomes another program,
// where only starters may. To look for a program and to name the error of not
// finding it starts nothing.
func checkProcesses(s source) (findings []string) {
	// The CLI starts bangerd, which must outlive it.
	spawns := s.path == filepath.Join("internal", "cli", "spawn.go")
	if s.test || spawns || slices.Contains(starters(), s.pkg) || strings.HasPrefix(s.pkg, "test"+string(filepath.Separator)) {
		return nil
	}
	harmless := map[string][]string{"os/exec": {"ErrNotFound", "LookPath", "Error", "ExitError"}}
	starts := map[string][]string{
		"os": {"StartProcess"}, "syscall": {"ForkExec", "StartProcess", "Exec"},
		"golang.org/x/sys/unix": {"Exec"},
	}
	for _, imp := range s.file.Imports {
		path, _ := strconv.Unquote(imp.Path.Value)
		name := filepath.Base(path)
		if imp.Name != nil {
			name = imp.Name.Name
		}
		fine, isExec := harmless[path]
		bad, isBad := starts[path]
		if !isExec && !isBad {
			continue
		}
		if name == "." {
			findings = append(findings, fmt.Sprintf("%s: %s imported without a name", s.at(imp), path))
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := sel.X.(*ast.Ident); !ok || x.Name != name || x.Obj != nil {
				return true
			}
			if isExec && !slices.Contains(fine, sel.Sel.Name) || isBad && slices.Contains(bad, sel.Sel.Name) {
				findings = append(findings, fmt.Sprintf("%s: %s.%s: only %s start processes", s.at(sel), name, sel.Sel.Name, strings.Join(starters()[:3], ", ")))
			}
			return true
		})
	}
	return findings
}

// checkLengths finds files and functions that are too long to be read.
func checkLengths(s source) (findings []string) {
	if s.test {
		return nil
	}
	if n := s.fset.File(s.file.Pos()).LineCount(); n > maxFile {
		findings = append(findings, fmt.Sprintf("%s: %d lines, at most %d", s.path, n, maxFile))
	}
	for _, d := range s.file.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		if n := s.fset.Position(f.End()).Line - s.fset.Position(f.Pos()).Line + 1; n > maxFunction {
			findings = append(findings, fmt.Sprintf("%s: %s has %d lines, at most %d", s.at(f), f.Name.Name, n, maxFunction))
		}
	}
	return findings
}

// daemonSurface is what package daemon exports beside options, which are functions
// called With… that return an Option.
func daemonSurface() map[string]string {
	return map[string]string{
		"Open": "", "Doctor": "", "Daemon": "", "Daemon.Serve": "", "Daemon.Close": "", "Option": "",
		"Build": "what WithBuild takes",
	}
}

// checkSurface finds what package daemon exports and should not, and what it
// should and does not.
func checkSurface(files []source) (findings []string) {
	found := make(map[string]bool)
	export := func(s source, n ast.Node, name string, option bool) {
		found[name] = true
		if _, ok := daemonSurface()[name]; !ok && !option {
			findings = append(findings, fmt.Sprintf("%s: package daemon exports %s", s.at(n), name))
		}
	}
	for _, s := range files {
		if s.test || s.pkg != filepath.Join("internal", "daemon") {
			continue
		}
		for _, d := range s.file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if name, ok := exportedFunc(d); ok {
					export(s, d, name, d.Recv == nil && isOption(d))
				}
			case *ast.GenDecl:
				for _, name := range exportedNames(d) {
					export(s, d, name, false)
				}
			}
		}
	}
	for name := range daemonSurface() {
		if !found[name] {
			findings = append(findings, "package daemon does not export "+name)
		}
	}
	slices.Sort(findings)
	return findings
}

// exportedFunc names a function or method that other packages can name. A method of
// an unexported type is reached through an interface only.
func exportedFunc(d *ast.FuncDecl) (string, bool) {
	if !d.Name.IsExported() {
		return "", false
	}
	if d.Recv == nil {
		return d.Name.Name, true
	}
	t := d.Recv.List[0].Type
	if p, ok := t.(*ast.StarExpr); ok {
		t = p.X
	}
	if ix, ok := t.(*ast.IndexExpr); ok {
		t = ix.X
	}
	receiver := called(t)
	return receiver + "." + d.Name.Name, ast.IsExported(receiver)
}

func exportedNames(d *ast.GenDecl) (names []string) {
	for _, sp := range d.Specs {
		switch sp := sp.(type) {
		case *ast.TypeSpec:
			if sp.Name.IsExported() {
				names = append(names, sp.Name.Name)
			}
		case *ast.ValueSpec:
			for _, n := range sp.Names {
				if n.IsExported() {
					names = append(names, n.Name)
				}
			}
		}
	}
	return names
}

func isOption(d *ast.FuncDecl) bool {
	r := d.Type.Results
	return strings.HasPrefix(d.Name.Name, "With") && r != nil && len(r.List) == 1 && called(r.List[0].Type) == "Option"
}

// checkText finds paths of the machine that a file was written on. What is looked
// for is put together here so that this file does not hold it.
func checkText(path string, data []byte) (findings []string) {
	for _, word := range []string{"/work" + "/", "/tmp/" + "plan"} {
		for i, line := range bytes.Split(data, []byte("\n")) {
			if bytes.Contains(line, []byte(word)) {
				findings = append(findings, fmt.Sprintf("%s:%d: %q", path, i+1, word))
			}
		}
	}
	return findings
}

// eachSource runs one rule over all files.
func eachSource(t *testing.T, rule func(source) []string) {
	for _, s := range sources(t) {
		report(t, rule(s))
	}
}

func TestNoMutablePackageVariables(t *testing.T) { eachSource(t, checkVariables) }

func TestWhoStartsProcesses(t *testing.T) { eachSource(t, checkProcesses) }

func TestLengths(t *testing.T) { eachSource(t, checkLengths) }

func TestSurfaceOfDaemon(t *testing.T) { report(t, checkSurface(sources(t))) }

func TestNoForeignPaths(t *testing.T) {
	eachFile(t, func(path string) {
		data, err := os.ReadFile(filepath.Join(root(), path))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(data[:min(len(data), 8000)], []byte{0}) {
			report(t, checkText(path, data))
		}
	})
}
