package structure

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

// levels is the table of docs/layout.md. A package imports only from levels below
// its own; -1 is the contract, which all but the shim and the guest's side may use.
func levels() map[string]int {
	table := map[int]string{
		-1: "api api/banger/v1 api/banger/v1/bangerv1connect",
		0: `internal/config internal/guest/wire internal/netpolicy internal/netwire internal/shim
			internal/daemon/driver internal/daemon/opstate internal/daemon/locks internal/daemon/hostcmd internal/daemon/proc internal/daemon/check internal/daemon/kvm`,
		1: `internal/daemon/store internal/daemon/cgroup internal/daemon/dmsnap internal/daemon/rootdisk internal/daemon/fcproc internal/daemon/qemuproc
			internal/daemon/initrd internal/daemon/imagemgr internal/daemon/driver/fake internal/daemon/driver/conformance internal/guest/boot internal/guest/agent internal/netstack internal/apply`,
		2: "internal/daemon/vm internal/daemon/image internal/daemon/image/imagetest internal/daemon/hostnet internal/daemon/workspace internal/daemon/session",
		3: "internal/daemon",
		4: "internal/cli",
		5: "cmd/banger cmd/bangerd cmd/banger-shim cmd/banger-guest cmd/banger-net",
	}
	of := make(map[string]int)
	for level, names := range table {
		for _, name := range strings.Fields(names) {
			of[name] = level
		}
	}
	return of
}

// notYet are packages that the design has and the tree has not. Whoever makes one
// takes it out of here.
func notYet() []string {
	return []string{
		"internal/daemon/hostnet",
		"internal/daemon/session",
	}
}

// testOnly are the packages of the table that are for tests: no program has them in it.
func testOnly() []string {
	return []string{"internal/daemon/driver/fake", "internal/daemon/driver/conformance", "internal/daemon/image/imagetest"}
}

// sideways are the arrows that the table forbids and a reason allows.
func sideways() map[string]string {
	return map[string]string{
		"internal/daemon/workspace → internal/daemon/session": "the founding document's: quoting and step errors",
		"internal/daemon/driver/fake → internal/guest/agent":  "the fake guest runs the real agent",
	}
}

// only says of a package who may import it, where the levels would let more.
func only() map[string][]string {
	return map[string][]string{
		"internal/daemon":      {"internal/cli"},
		"internal/apply":       {"internal/cli"}, // docs/decisions/006
		"internal/netstack":    {"cmd/banger-net"},
		"internal/guest/boot":  {"cmd/banger-guest"},
		"internal/guest/agent": {"cmd/banger-guest", "internal/daemon/driver/fake"},
	}
}

// outside says which modules a package may use beside the standard library and
// golang.org/x/sys, for those that must stay small or pure. The others are free.
func outside() map[string][]string {
	return map[string][]string{
		"api": nil, "internal/shim": nil, "internal/netpolicy": nil, "internal/netwire": nil, "internal/guest/boot": nil, "internal/apply": nil,
		"internal/guest/wire":     {"github.com/hashicorp/yamux"},
		"internal/guest/agent":    {"github.com/creack/pty"},
		"internal/config":         {"github.com/pelletier/go-toml/v2", "github.com/docker/go-units"},
		"internal/daemon/driver":  nil,
		"internal/daemon/opstate": nil,
		"internal/daemon/locks":   nil,
		"internal/daemon/hostcmd": nil,
		"internal/daemon/proc":    nil,
		"internal/daemon/check":   nil,
		"internal/daemon/kvm":     nil,
	}
}

// isSQL tells the packages that only the store may see.
func isSQL(path string) bool {
	return path == "database/sql" || strings.HasPrefix(path, "database/sql/") ||
		strings.HasPrefix(path, "modernc.org/sqlite") || strings.HasPrefix(path, "github.com/pressly/goose/")
}

// ours tells whether an import path belongs to the module.
func ours(path string) (name string, ok bool) {
	return strings.CutPrefix(path, module+"/")
}

// isStandard tells an import path of the standard library.
func isStandard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".") && first != module
}

// isTest tells the packages below test, which have no level: they may import all, and
// no package of the table may import them.
func isTest(name string) bool { return strings.HasPrefix(name, "test/") }

// checkImports finds every arrow that goes anywhere but down.
func checkImports(list []goPackage) (findings []string) {
	level := levels()
	for _, p := range list {
		if isTest(p.ImportPath) {
			continue
		}
		from, known := level[p.ImportPath]
		if !known {
			findings = append(findings, p.ImportPath+" has no level: see levels")
			continue
		}
		for _, path := range p.Imports {
			if name, ok := ours(path); ok {
				findings = append(findings, checkArrow(p.ImportPath, from, name)...)
				continue
			}
			if isSQL(path) && p.ImportPath != "internal/daemon/store" {
				findings = append(findings, fmt.Sprintf("%s imports %s: only internal/daemon/store knows SQL", p.ImportPath, path))
			}
			if allowed, limited := outside()[p.ImportPath]; limited && !isStandard(path) && !slices.ContainsFunc(allowed, inModule(path)) {
				sys := strings.HasPrefix(path, "golang.org/x/sys/") && p.ImportPath != "internal/shim" && p.ImportPath != "api"
				if !sys {
					findings = append(findings, fmt.Sprintf("%s imports %s, which outside does not allow", p.ImportPath, path))
				}
			}
		}
	}
	return findings
}

func inModule(path string) func(string) bool {
	return func(m string) bool { return path == m || strings.HasPrefix(path, m+"/") }
}

// checkArrow judges one import of the module's own.
func checkArrow(from string, fromLevel int, to string) (findings []string) {
	arrow := from + " → " + to
	toLevel, known := levels()[to]
	if isTest(to) || slices.Contains(testOnly(), to) {
		return []string{arrow + ": only tests import test support"}
	}
	if !known {
		return []string{arrow + ": it has no level"}
	}
	_, excepted := sideways()[arrow]
	// The packages of the contract itself may lean on each other.
	if toLevel >= fromLevel && !excepted && fromLevel != -1 {
		findings = append(findings, fmt.Sprintf("%s goes from level %d to level %d", arrow, fromLevel, toLevel))
	}
	if fromLevel == -1 && toLevel > -1 {
		findings = append(findings, arrow+": the contract imports nothing of the program")
	}
	if importers, limited := only()[to]; limited && !slices.Contains(importers, from) {
		findings = append(findings, fmt.Sprintf("%s: only %s may", arrow, strings.Join(importers, " and ")))
	}
	guest := strings.HasPrefix(from, "internal/guest/") || from == "internal/netstack"
	if guest && (strings.HasPrefix(to, "internal/daemon") || toLevel == -1) {
		findings = append(findings, arrow+": the guest's side knows nothing of the host's")
	}
	if from == "internal/shim" {
		findings = append(findings, arrow+": the shim imports the standard library only")
	}
	return findings
}

// checkPresence compares the table with the tree.
func checkPresence(list []goPackage) (findings []string) {
	present := make(map[string]bool)
	for _, p := range list {
		present[p.ImportPath] = true
	}
	absent := notYet()
	for _, name := range absent {
		if _, known := levels()[name]; !known {
			findings = append(findings, name+" is in notYet and has no level")
		}
		if present[name] {
			findings = append(findings, name+" is there: take it out of notYet")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(levels())) {
		if !present[name] && !slices.Contains(absent, name) {
			findings = append(findings, name+" has a level and is not there")
		}
	}
	return findings
}

func TestImportsGoDown(t *testing.T) { report(t, checkImports(packages(t))) }

func TestEveryPackageOfTheTableIsThere(t *testing.T) { report(t, checkPresence(packages(t))) }

// TestImportRule tries the rule on arrows that must and must not be.
func TestImportRule(t *testing.T) {
	for arrow, want := range map[string]string{
		"internal/daemon/vm → banger/internal/daemon/store":          "",
		"internal/daemon/vm → banger/api":                            "",
		"internal/daemon/workspace → banger/internal/daemon/session": "",
		"internal/cli → banger/internal/daemon":                      "",
		"internal/cli → banger/internal/apply":                       "",
		"internal/apply → banger/internal/daemon/hostcmd":            "",
		"cmd/banger-shim → banger/internal/shim":                     "",
		"internal/daemon/store → database/sql":                       "",
		"internal/daemon/proc → golang.org/x/sys/unix":               "",
		"internal/guest/agent → github.com/creack/pty":               "",
		"api/banger/v1/bangerv1connect → banger/api/banger/v1":       "",
		"test/daemon → banger/internal/daemon/image/imagetest":       "",

		"internal/daemon/session → banger/internal/daemon/workspace": "from level 2 to level 2",
		"internal/daemon/vm → banger/internal/daemon/image":          "from level 2 to level 2",
		"internal/daemon/store → banger/internal/daemon/vm":          "from level 1 to level 2",
		"internal/daemon/opstate → banger/internal/config":           "from level 0 to level 0",
		"internal/daemon/vm → banger/internal/cli":                   "from level 2 to level 4",
		"cmd/bangerd → banger/internal/daemon":                       "only internal/cli may",
		"internal/daemon → banger/internal/apply":                    "only internal/cli may",
		"internal/apply → banger/internal/daemon/workspace":          "from level 1 to level 2",
		"internal/daemon → banger/internal/guest/boot":               "only cmd/banger-guest may",
		"internal/daemon/vm → database/sql":                          "only internal/daemon/store knows SQL",
		"internal/daemon/image → modernc.org/sqlite/lib":             "only internal/daemon/store knows SQL",
		"internal/shim → golang.org/x/sys/unix":                      "which outside does not allow",
		"internal/shim → banger/internal/daemon/proc":                "standard library only",
		"internal/shim → banger/api":                                 "standard library only",
		"internal/guest/agent → banger/internal/daemon/proc":         "nothing of the host's",
		"internal/guest/wire → banger/api":                           "nothing of the host's",
		"internal/daemon/hostcmd → github.com/creack/pty":            "which outside does not allow",
		"internal/daemon/vm → banger/test/need":                      "only tests import test support",
		"internal/daemon → banger/internal/daemon/driver/fake":       "only tests import test support",
		"internal/daemon → banger/internal/daemon/image/imagetest":   "only tests import test support",
		"internal/daemon/image/imagetest → banger/internal/cli":      "from level 2 to level 4",
		"internal/util → fmt":                                        "has no level",
		"internal/daemon/vm → banger/internal/util":                  "has no level",
		"api → banger/internal/config":                               "imports nothing of the program",
	} {
		from, to, _ := strings.Cut(arrow, " → ")
		got := strings.Join(checkImports([]goPackage{{ImportPath: from, Imports: []string{"fmt", to}}}), "\n")
		if want == "" && got != "" || want != "" && !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", arrow, got, want)
		}
	}
}

func TestPresenceRule(t *testing.T) {
	var all []goPackage
	for name := range levels() {
		if !slices.Contains(notYet(), name) {
			all = append(all, goPackage{ImportPath: name})
		}
	}
	if got := checkPresence(all); len(got) != 0 {
		t.Errorf("a whole tree: %v", got)
	}
	if got := checkPresence(all[1:]); len(got) != 1 || !strings.Contains(got[0], all[0].ImportPath+" has a level and is not there") {
		t.Errorf("a package less: %v", got)
	}
	if got := checkPresence(append(all, goPackage{ImportPath: notYet()[0]})); len(got) != 1 || !strings.Contains(got[0], "take it out of notYet") {
		t.Errorf("a new package: %v", got)
	}
}
