package imagemgr

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"

	"banger/internal/daemon/hostcmd"
)

// ErrNetwork: the packages could not be fetched.
var ErrNetwork = errors.New("cannot reach the package mirror")

// ErrSignature: what the mirror serves is not signed by Debian.
var ErrSignature = errors.New("the package lists are not signed by a key of the archive keyring")

// MissingError is what the host lacks, all of it.
type MissingError struct {
	What     []string // programs and files, "mmdebstrap"
	Packages []string // of Debian and Ubuntu
}

func (e *MissingError) Error() string {
	if len(e.What) == 1 {
		return e.What[0] + " is not installed"
	}
	last := len(e.What) - 1
	return strings.Join(e.What[:last], ", ") + " and " + e.What[last] + " are not installed"
}

// Remedy is one command that helps.
func (e *MissingError) Remedy() string {
	return hostcmd.Install(e.Packages...)
}

// NamespaceError: an ordinary user cannot make a user namespace with other owners
// in it, which building an image needs.
type NamespaceError struct {
	Reason string
	Remedy string // one command
}

func (e *NamespaceError) Error() string { return e.Reason }

// outOfSpace is what the tools say of a full disk: everybody's errno text, and apt's own.
func outOfSpace(stderr string) bool {
	for _, s := range []string{
		"No space left on device", "Disk quota exceeded", "enough free space",
	} {
		if strings.Contains(stderr, s) {
			return true
		}
	}
	return false
}

func unreachable(stderr string) bool {
	for _, s := range []string{
		"Temporary failure resolving", "Could not resolve", "Could not connect", "Unable to connect",
		"Connection failed", "Connection timed out", "Cannot initiate the connection", "Failed to fetch",
	} {
		if strings.Contains(stderr, s) {
			return true
		}
	}
	return false
}

func unsigned(stderr string) bool {
	return strings.Contains(stderr, "is not signed") || strings.Contains(stderr, "NO_PUBKEY") ||
		strings.Contains(stderr, "signatures couldn't be verified") || strings.Contains(stderr, "cannot be authenticated")
}

// explain says what failed in words, and marks what a caller acts on: a full disk
// is syscall.ENOSPC, then ErrSignature, ErrNetwork, *MissingError.
func explain(err error) error {
	var e *hostcmd.Error
	if !errors.As(err, &e) {
		return err
	}
	text := complaint(e.Stderr)
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return &MissingError{What: e.Argv[:1], Packages: []string{hostcmd.PackageOf(e.Argv[0])}}
	case outOfSpace(e.Stderr):
		return fmt.Errorf("%s: %w", program(e.Argv), syscall.ENOSPC)
	case unsigned(e.Stderr):
		return fmt.Errorf("%w: %s", ErrSignature, text)
	case unreachable(e.Stderr):
		return fmt.Errorf("%w: %s", ErrNetwork, text)
	case text != "":
		return fmt.Errorf("%s: %w: %s", program(e.Argv), e.Err, text)
	}
	return err
}

// complaint is the first error that apt, dpkg or mmdebstrap printed: what follows
// is what came of it. Empty when there is none.
func complaint(stderr string) string {
	for line := range strings.Lines(stderr) {
		for _, mark := range []string{"E: ", "dpkg: error: ", "dpkg-deb: error: "} {
			if text, ok := strings.CutPrefix(strings.TrimSpace(line), mark); ok {
				const most = 300
				return strings.ToValidUTF8(text[:min(len(text), most)], "")
			}
		}
	}
	return ""
}

// program is the tool itself, without what it was wrapped in.
func program(argv []string) string {
	for i, arg := range argv {
		if i > 0 && argv[0] == "unshare" && !strings.HasPrefix(arg, "-") {
			return arg
		}
	}
	return argv[0]
}
