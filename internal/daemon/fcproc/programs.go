package fcproc

import (
	"cmp"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"banger/internal/daemon/hostcmd"
	"banger/internal/daemon/kvm"
)

// Tested is the version that banger is tested with and installs.
const Tested = "1.12.1"

// Firecracker announces its devices by ACPI from 1.8 on, see its CHANGELOG.md: a stock
// kernel finds none in an older one. All that banger asks of the API is older.
const oldestMajor, oldestMinor = 1, 8

// DirEnv names the environment variable whose directory is looked into first.
const DirEnv = "BANGER_FIRECRACKER_DIR"

// The programs' names.
const (
	firecracker = "firecracker"
	jailer      = "jailer"
)

// setup is what Probe found.
type setup struct {
	Firecracker, Jailer string // absolute paths; of the first, without links
	Version             string
}

// jailName is the first directory of a jail: the jailer calls it like the program, after
// it has followed links, see src/jailer/src/env.rs.
func (s setup) jailName() string { return filepath.Base(s.Firecracker) }

// programError says what is wrong with the programs, not with the machine.
type programError struct{ err error }

func (e *programError) Error() string { return e.err.Error() }
func (e *programError) Unwrap() error { return e.err }

// programs finds both and asks them for their version.
func (v *VMM) programs(ctx context.Context) (setup, error) {
	s, err := v.find()
	if err == nil {
		s.Version, err = pairVersion(ctx, s)
	}
	if err != nil {
		return setup{}, &programError{err}
	}
	return s, nil
}

func pairVersion(ctx context.Context, s setup) (string, error) {
	// The jailer's own refusal is a panic.
	if name := s.jailName(); !strings.Contains(name, firecracker) {
		return "", fmt.Errorf("%s has another name, the jailer takes none without %q in it", s.Firecracker, firecracker)
	}
	version, err := versionOf(ctx, s.Firecracker, "Firecracker")
	if err != nil {
		return "", err
	}
	ofJailer, err := versionOf(ctx, s.Jailer, "Jailer")
	if err != nil {
		return "", err
	}
	if ofJailer != version {
		return "", fmt.Errorf("%s is of version %s and %s of %s", s.Firecracker, version, s.Jailer, ofJailer)
	}
	if !recent(version) {
		return "", fmt.Errorf("%s is of version %s, which announces no devices by ACPI: %d.%d is the oldest that boots stock kernels",
			s.Firecracker, version, oldestMajor, oldestMinor)
	}
	return version, nil
}

// find looks for both programs in one place: they are a pair.
func (v *VMM) find() (setup, error) {
	for _, dir := range v.dirs {
		s := setup{Firecracker: filepath.Join(dir, firecracker), Jailer: filepath.Join(dir, jailer)}
		_, err := os.Stat(s.Firecracker)
		_, jerr := os.Stat(s.Jailer)
		switch {
		case err == nil && jerr == nil:
			return s.resolve()
		case (err == nil) != (jerr == nil):
			return setup{}, fmt.Errorf("%s has one of %s and %s: both are needed", dir, firecracker, jailer)
		}
	}
	var s setup
	for name, path := range map[string]*string{firecracker: &s.Firecracker, jailer: &s.Jailer} {
		found, err := hostcmd.LookPath(name)
		if err != nil {
			return setup{}, fmt.Errorf("%s is not installed on this machine", name)
		}
		*path = found
	}
	return s.resolve()
}

func (s setup) resolve() (setup, error) {
	for _, path := range []*string{&s.Firecracker, &s.Jailer} {
		abs, err := filepath.Abs(*path)
		if err != nil {
			return setup{}, err
		}
		*path = abs
	}
	real, err := filepath.EvalSymlinks(s.Firecracker)
	s.Firecracker = real
	return s, err
}

// Remedy is a command that may help after an error of Probe.
func Remedy(err error) string {
	if bad := new(programError); errors.As(err, &bad) {
		return remedyOfPrograms()
	}
	return cmp.Or(kvm.Look(false).Remedy(), "banger doctor")
}

func remedyOfPrograms() string {
	if os.Getenv(DirEnv) != "" {
		return "unset " + DirEnv
	}
	return "sudo banger setup firecracker"
}

var versionLine = regexp.MustCompile(`^(\S+) v((\d+)\.(\d+)\.\d+\S*)$`)

// recent tells whether a version is the oldest that will do, or newer.
func recent(version string) bool {
	m := versionLine.FindStringSubmatch("x v" + version)
	if m == nil {
		return false
	}
	major, err := strconv.Atoi(m[3])
	minor, merr := strconv.Atoi(m[4])
	return err == nil && merr == nil && (major > oldestMajor || major == oldestMajor && minor >= oldestMinor)
}

// versionOf runs a program for its version. The first line is like "Firecracker v1.12.1".
func versionOf(ctx context.Context, program, name string) (string, error) {
	if err := sameMachine(program); err != nil {
		return "", err
	}
	out, err := hostcmd.Run(ctx, hostcmd.Command{Argv: []string{program, "--version"}})
	if err != nil {
		return "", fmt.Errorf("cannot ask %s for its version: %w", program, err)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	m := versionLine.FindStringSubmatch(strings.TrimSpace(first))
	if m == nil || m[1] != name {
		return "", fmt.Errorf("%s is no %s: it says %.60q", program, name, first)
	}
	return m[2], nil
}

// sameMachine refuses what this machine's kernel does not run by itself: a jail has no
// interpreter.
func sameMachine(program string) error {
	f, err := elf.Open(program)
	if err != nil {
		return fmt.Errorf("%s is no program: %w", program, err)
	}
	defer f.Close()
	want := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[runtime.GOARCH]
	if f.Machine != want {
		return fmt.Errorf("%s is for another machine: %s, this one is %s", program, f.Machine, want)
	}
	return nil
}
