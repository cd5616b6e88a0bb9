package imagemgr

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"banger/internal/daemon/hostcmd"
)

// tool is a program of the host that building needs.
type tool struct {
	name  string
	image bool // needed for images, not for kernels alone
	user  bool // needed without root only
}

func tools() []tool {
	return []tool{
		{name: "apt-get"},
		{name: "apt-cache"},
		{name: "apt-config"},
		{name: "dpkg-deb"},
		{name: "depmod"},
		{name: "mkfs.ext4"},
		{name: "e2fsck"},
		{name: "unshare"},
		{name: "mmdebstrap", image: true},
		{name: "tar", image: true},
		{name: "newuidmap", image: true, user: true},
	}
}

// require fails with a *MissingError when the host lacks something.
func (b *Builder) require(image bool) error {
	missing := &MissingError{}
	miss := func(what, pkg string) {
		missing.What = append(missing.What, what)
		if !slices.Contains(missing.Packages, pkg) {
			missing.Packages = append(missing.Packages, pkg)
		}
	}
	for _, t := range tools() {
		if t.image && !image || t.user && b.root {
			continue
		}
		if _, err := hostcmd.LookPath(t.name); err != nil {
			miss(t.name, hostcmd.PackageOf(t.name))
		}
	}
	if _, err := os.Stat(b.Keyring); errors.Is(err, fs.ErrNotExist) {
		miss(b.Keyring, "debian-archive-keyring")
	} else if err != nil {
		return err
	}
	if len(missing.What) > 0 {
		return missing
	}
	return nil
}

// subIDs is how many subordinate ids mmdebstrap wants, see its manual.
const subIDs = 65536

// requireNamespace tells whether this user may make a user namespace with other
// owners in it: a *NamespaceError says what to do.
func (b *Builder) requireNamespace(ctx context.Context) error {
	if b.root {
		return nil
	}
	me, err := user.Current()
	if err != nil {
		return fmt.Errorf("cannot tell the user's name: %w", err)
	}
	for _, path := range []string{b.subuid, b.subgid} {
		data, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if ok, _ := subRange(string(data), me.Username, me.Uid); !ok {
			_, free := subRange(string(data), "", "")
			return &NamespaceError{
				Reason: fmt.Sprintf("%s gives %s no range of %d ids, which building an image needs", path, me.Username, subIDs),
				Remedy: fmt.Sprintf("sudo usermod --add-subuids %[1]d-%[2]d --add-subgids %[1]d-%[2]d %[3]s", free, free+subIDs-1, me.Username),
			}
		}
	}
	if _, err := hostcmd.Run(ctx, hostcmd.Command{Argv: b.asRoot("true")}); err != nil {
		return &NamespaceError{
			Reason: fmt.Sprintf("this machine does not let %s make a user namespace: %v", me.Username, err),
			Remedy: namespaceRemedy("/proc/sys"),
		}
	}
	return nil
}

// namespaceRemedy names the setting that keeps an ordinary user from making a user
// namespace, as far as one does. proc is /proc/sys.
func namespaceRemedy(proc string) string {
	for _, s := range []struct{ key, bad, good string }{
		{"kernel.apparmor_restrict_unprivileged_userns", "1", "0"}, // Ubuntu 23.10 and later
		{"kernel.unprivileged_userns_clone", "0", "1"},             // Debian
		{"user.max_user_namespaces", "0", "15000"},
	} {
		data, err := os.ReadFile(filepath.Join(proc, strings.ReplaceAll(s.key, ".", "/")))
		if err == nil && strings.TrimSpace(string(data)) == s.bad {
			return "sudo sysctl " + s.key + "=" + s.good
		}
	}
	return "unshare --user --map-auto --map-root-user true"
}

// subRange reads subuid(5): whether user has a range that is large enough, and the
// first id after all ranges.
func subRange(file, name, uid string) (ok bool, free int) {
	free = 100000 // SUB_UID_MIN of login.defs(5)
	s := bufio.NewScanner(strings.NewReader(file))
	for s.Scan() {
		f := strings.Split(strings.TrimSpace(s.Text()), ":")
		if len(f) != 3 {
			continue
		}
		start, err1 := strconv.Atoi(f[1])
		count, err2 := strconv.Atoi(f[2])
		if err1 != nil || err2 != nil || start < 0 || count < 0 {
			continue
		}
		free = max(free, start+count)
		if (f[0] == name || f[0] == uid) && count >= subIDs {
			ok = true
		}
	}
	return ok, free
}

// asRoot wraps argv so that it may own files as anybody: as root in a user
// namespace with the user's subordinate ids, or plainly, when we are root.
func (b *Builder) asRoot(argv ...string) []string {
	if b.root {
		return argv
	}
	return append([]string{"unshare", "--user", "--map-auto", "--map-root-user"}, argv...)
}

// asOwner wraps argv so that files of our own look like root's. It needs no
// subordinate ids.
func (b *Builder) asOwner(argv ...string) []string {
	if b.root {
		return argv
	}
	return append([]string{"unshare", "--user", "--map-root-user"}, argv...)
}
