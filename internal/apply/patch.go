package apply

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"strconv"
	"strings"

	"banger/api"
)

// checkForms refuses a patch that banger does not make: it has no renames and copies,
// which name a second file, and no submodules. In a patch these lines cannot be the
// content of a file, which is indented by one character.
func checkForms(patch io.Reader) error {
	in := bufio.NewReaderSize(patch, 64<<10)
	for whole := true; ; {
		line, isPrefix, err := in.ReadLine()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if whole {
			for _, form := range []string{"rename from ", "rename to ", "copy from ", "copy to ", "rename old ", "rename new "} {
				if bytes.HasPrefix(line, []byte(form)) {
					return malformed("it renames or copies files")
				}
			}
			for _, form := range []string{"new file mode 16", "deleted file mode 16", "old mode 16", "new mode 16"} {
				if bytes.HasPrefix(line, []byte(form)) {
					return malformed("it changes a submodule")
				}
			}
		}
		whole = !isPrefix
	}
}

func malformed(why string) error {
	return api.Errorf(api.Refused, "the guest's patch is not one that banger makes: %s", why).WithHint("banger diff")
}

// touched are the files that a patch names.
type touched struct {
	paths   []string
	created map[string]bool
}

// touched reads the names of files out of the patch.
func (s *session) touched(ctx context.Context) (touched, error) {
	t := touched{created: map[string]bool{}}
	if err := s.scratch(); err != nil {
		return t, err
	}
	out, err := s.gitApply(ctx, "--numstat", "-z")
	if err != nil {
		return t, refusal(err)
	}
	named := map[string]bool{}
	for item := range strings.SplitSeq(strings.TrimSuffix(out, "\x00"), "\x00") {
		// ADDED<tab>DELETED<tab>PATH
		f := strings.SplitN(item, "\t", 3)
		if len(f) != 3 || !safePath(f[2]) {
			return t, malformed("it names the path " + strconv.Quote(f[len(f)-1]))
		}
		if !named[f[2]] {
			named[f[2]] = true
			t.paths = append(t.paths, f[2])
		}
	}
	summary, err := s.gitApply(ctx, "--summary")
	if err != nil {
		return t, refusal(err)
	}
	for line := range strings.SplitSeq(summary, "\n") {
		if mode, ok := strings.CutPrefix(line, " create mode "); ok {
			if _, path, _ := strings.Cut(mode, " "); named[path] {
				t.created[path] = true
			}
		}
	}
	return t, nil
}

// safePath tells whether a path stays in the repository and out of its git directory, also
// on a file system that ignores case, as HFS+ and NTFS read names. git checks this too.
// What workspace lets in is more, on purpose: there it is about the user's own index, where
// a name is no attack that git takes on this machine; here a stranger names the files.
func safePath(path string) bool {
	for part := range strings.SplitSeq(path, "/") {
		name := strings.Map(func(r rune) rune {
			switch {
			case r >= 0x200c && r <= 0x200f, r >= 0x202a && r <= 0x202e, r >= 0x206a && r <= 0x206f, r == 0xfeff:
				return -1
			}
			return r
		}, part)
		name, _, _ = strings.Cut(name, ":")
		name = strings.TrimRight(name, ". ")
		if part == "" || part == "." || part == ".." || strings.EqualFold(name, ".git") || strings.EqualFold(name, "git~1") {
			return false
		}
	}
	return !strings.ContainsAny(path, "\x00")
}

// refusal explains why git did not take the patch.
func refusal(err error) error {
	if !answered(err) {
		return err
	}
	var names []string
	for line := range strings.SplitSeq(gitSays(err), "\n") {
		line = strings.TrimPrefix(line, "error: ")
		for _, end := range []string{": patch does not apply", ": No such file or directory", ": already exists in working directory", ": already exists in index", ": does not exist in index", ": wrong type"} {
			if name, ok := strings.CutSuffix(line, end); ok {
				names = append(names, name)
			}
		}
	}
	if len(names) == 0 {
		return api.Errorf(api.Refused, "git does not take the patch: %w", err).WithHint("banger diff")
	}
	return api.Errorf(api.Refused, "the host's files have changed in the same places: %s", list(names)).WithHint("banger apply --branch NAME")
}
