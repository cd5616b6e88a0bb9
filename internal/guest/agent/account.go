package agent

import (
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"

	"banger/internal/guest/wire"
)

// account is a user as /etc/passwd and /etc/group have it. They are parsed here
// because the agent is built without cgo and its root may change under it.
type account struct {
	name        string
	uid, gid    uint32
	home, shell string
	groups      []uint32 // supplementary
}

// defaultPath is that of Debian's login.defs for root. Users get sbin too: they may
// need ip or mkfs to look at things.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// maxAccountFile bounds what is read of a file of accounts, in bytes.
const maxAccountFile = 8 << 20

// account finds a user: by name, uid, or either with ":" and a group's name or gid;
// the empty spec is the default user. A uid without an entry has group 0 and no
// home, as with docker exec; a group that is named replaces all others.
func (a *Agent) account(spec string) (account, error) {
	passwd, group := a.table("etc/passwd", 7), a.table("etc/group", 4)
	if spec == "" {
		spec = a.defaultUser(passwd)
	}
	user, groupSpec, withGroup := strings.Cut(spec, ":")
	u, ok := findUser(passwd, user)
	if !ok {
		return account{}, refusal(wire.ErrNoUser, "the guest has no user %s", user)
	}
	if !withGroup {
		u.groups = groupsOf(group, u)
		return u, nil
	}
	gid, ok := findGroup(group, groupSpec)
	if !ok {
		return account{}, refusal(wire.ErrNoUser, "the guest has no group %s", groupSpec)
	}
	u.gid = gid
	return u, nil
}

// defaultUser is the configured one when the system has it, else root.
func (a *Agent) defaultUser(passwd [][]string) string {
	if c := a.opts.Config.User; c != nil {
		for _, f := range passwd {
			if f[0] == c.Name {
				return c.Name
			}
		}
	}
	return "root"
}

// table reads a colon separated file, dropping lines with fewer than n fields. A
// file that is not there is empty.
func (a *Agent) table(name string, n int) [][]string {
	var lines [][]string
	for line := range strings.Lines(readBounded(a.file(name))) {
		if f := strings.Split(strings.TrimRight(line, "\r\n"), ":"); len(f) >= n {
			lines = append(lines, f)
		}
	}
	return lines
}

func readBounded(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	data, _ := io.ReadAll(io.LimitReader(f, maxAccountFile))
	return string(data)
}

func findUser(passwd [][]string, user string) (account, bool) {
	uid, isNumber := parseID(user)
	byUID := -1
	for i, f := range passwd {
		if f[0] == user {
			return parseUser(f)
		}
		if id, ok := parseID(f[2]); ok && isNumber && id == uid && byUID < 0 {
			byUID = i
		}
	}
	switch {
	case byUID >= 0:
		return parseUser(passwd[byUID])
	case isNumber && uid != 0:
		return account{name: user, uid: uid, home: "/", shell: "/bin/sh"}, true
	case user == "root" || isNumber:
		return account{name: "root", home: "/root", shell: "/bin/sh"}, true
	}
	return account{}, false
}

func parseUser(f []string) (account, bool) {
	uid, ok1 := parseID(f[2])
	gid, ok2 := parseID(f[3])
	u := account{name: f[0], uid: uid, gid: gid, home: f[5], shell: f[6]}
	if u.home == "" {
		u.home = "/"
	}
	if u.shell == "" {
		u.shell = "/bin/sh" // passwd(5)
	}
	return u, ok1 && ok2 && u.name != ""
}

func groupsOf(group [][]string, u account) []uint32 {
	var ids []uint32
	for _, f := range group {
		gid, ok := parseID(f[2])
		if !ok || gid == u.gid {
			continue
		}
		for member := range strings.SplitSeq(f[3], ",") {
			if member == u.name {
				ids = append(ids, gid)
				break
			}
		}
	}
	return ids
}

func findGroup(group [][]string, spec string) (uint32, bool) {
	for _, f := range group {
		if f[0] == spec {
			return parseID(f[2])
		}
	}
	return parseID(spec)
}

// parseID parses a uid or gid; 4294967295 is "no change" to the kernel and none.
func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n != 1<<32-1
}

// credential is how a child becomes u; nil when the agent is u already.
func (u account) credential() *syscall.Credential {
	if int(u.uid) == os.Geteuid() && int(u.gid) == os.Getegid() && (u.uid != 0 || len(u.groups) == 0) {
		return nil
	}
	return &syscall.Credential{Uid: u.uid, Gid: u.gid, Groups: u.groups}
}

// environ is the environment of u's login with extra over it, each name once.
func (a *Agent) environ(u account, tty bool, extra []string) []string {
	env := []string{"PATH=" + defaultPath}
	for line := range strings.Lines(readBounded(a.file("etc/environment"))) {
		if kv, ok := parseEnvironment(line); ok {
			env = append(env, kv)
		}
	}
	if tty {
		env = append(env, "TERM=xterm")
	}
	env = append(env, "HOME="+u.home, "USER="+u.name, "LOGNAME="+u.name, "SHELL="+u.shell)
	env = append(env, extra...)

	last := make(map[string]int, len(env))
	for i, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		last[name] = i
	}
	var unique []string
	for i, kv := range env {
		if name, _, _ := strings.Cut(kv, "="); last[name] == i {
			unique = append(unique, kv)
		}
	}
	return unique
}

// parseEnvironment parses a line of /etc/environment as pam_env(8) does: an
// optional "export ", a value optionally in quotes, "#" begins a comment line.
func parseEnvironment(line string) (string, bool) {
	line = strings.TrimPrefix(strings.TrimSpace(line), "export ")
	name, value, ok := strings.Cut(line, "=")
	if !ok || name == "" || strings.ContainsAny(name, " \t#\x00") || strings.ContainsRune(value, 0) {
		return "", false
	}
	if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
		value = value[1 : n-1]
	}
	return name + "=" + value, true
}

func getenv(env []string, name string) string {
	for _, kv := range env {
		if k, v, _ := strings.Cut(kv, "="); k == name {
			return v
		}
	}
	return ""
}
