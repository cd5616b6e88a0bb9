package boot

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"banger/internal/guest/wire"
)

// account is who the user is inside the guest.
type account struct {
	name        string
	uid, gid    int
	home, shell string
}

// accountFiles are the contents of the image's account files; the shadow files
// may not exist.
type accountFiles struct {
	passwd, group, shadow, gshadow string
	hasShadow, hasGShadow          bool
}

const (
	firstUID     = 1000     // UID_MIN of login.defs(5)
	spareName    = "banger" // where the wanted name cannot be had
	defaultShell = "/bin/sh"
)

// resolveUser is the rule by which the caller becomes an account of the image. It
// returns the account, and the files with what they lacked:
//
//  1. uid 0 is root: the image's root, nothing is made.
//  2. A uid below 1000, 65534 (nobody), 65535 or above 2^31-1 becomes 1000.
//  3. Whoever holds that uid in the image is the user, under the image's name.
//  4. Otherwise an account is made. It has the wanted name if useradd(8) would take
//     it and no account of the image has it; else the first free of banger,
//     banger2, banger3 …
//  5. Its group is the wanted gid, or the number of its uid where that is below
//     1000 or reserved; the group is made if the image lacks it, with the account's
//     name, or with the first free of banger, banger2 …
//  6. An account whose login shell is missing, does not exist in the image, or only
//     turns people away (nologin, false) gets /bin/bash, or /bin/sh.
//
// The numbers of files in the workspace depend on the uid, so it is kept where it
// can be; a name is only a name. Applied to its own result the rule changes nothing.
// shells tells whether a path is a program of the image.
func resolveUser(want wire.User, in accountFiles, shells func(path string) bool) (account, accountFiles, error) {
	out := in
	if out.passwd == "" {
		out.passwd = "root:x:0:0:root:/root:" + chooseShell(shells) + "\n"
	}
	if want.UID == 0 {
		return rootAccount(out.passwd), out, nil
	}
	uid := want.UID
	if reservedID(uid) {
		uid = firstUID
	}
	if line, ok := findLine(out.passwd, 2, strconv.Itoa(uid), 7); ok {
		return existingAccount(line, uid, out, shells)
	}

	a := account{uid: uid, gid: want.GID, shell: chooseShell(shells)}
	if reservedID(a.gid) {
		a.gid = uid
	}
	var err error
	a.name, err = freeName(want.Name, func(name string) bool {
		_, taken := findLine(out.passwd, 0, name, 7)
		return taken
	})
	if err != nil {
		return account{}, in, err
	}
	a.home = "/home/" + a.name
	if _, ok := findLine(out.group, 2, strconv.Itoa(a.gid), 4); !ok {
		group, err := freeName(a.name, func(name string) bool {
			_, taken := findLine(out.group, 0, name, 4)
			return taken
		})
		if err != nil {
			return account{}, in, err
		}
		out.group = addLine(out.group, fmt.Sprintf("%s:x:%d:", group, a.gid))
		if _, ok := findLine(out.gshadow, 0, group, 4); !ok && out.hasGShadow {
			out.gshadow = addLine(out.gshadow, group+":!::")
		}
	}
	password := "x"
	if !out.hasShadow {
		password = "*"
	}
	out.passwd = addLine(out.passwd, fmt.Sprintf("%s:%s:%d:%d::%s:%s", a.name, password, a.uid, a.gid, a.home, a.shell))
	return a, addShadow(out, a.name), nil
}

// existingAccount is rules 3 and 6.
func existingAccount(line string, uid int, out accountFiles, shells func(string) bool) (account, accountFiles, error) {
	f := strings.Split(line, ":")
	gid, err := strconv.Atoi(f[3])
	if err != nil {
		return account{}, out, fmt.Errorf("the image's account %s has the group %q", f[0], f[3])
	}
	a := account{name: f[0], uid: uid, gid: gid, home: f[5], shell: f[6]}
	if !loginShell(a.shell, shells) {
		a.shell = chooseShell(shells)
		f[6] = a.shell
		out.passwd = strings.Replace("\n"+out.passwd, "\n"+line+"\n", "\n"+strings.Join(f, ":")+"\n", 1)[1:]
	}
	if f[1] == "x" {
		out = addShadow(out, a.name)
	}
	return a, out, nil
}

// addShadow gives the account an entry without a password that could be typed and
// without ages that could expire, see shadow(5).
func addShadow(out accountFiles, name string) accountFiles {
	if _, ok := findLine(out.shadow, 0, name, 8); !ok && out.hasShadow {
		out.shadow = addLine(out.shadow, name+":*:::::::")
	}
	return out
}

func rootAccount(passwd string) account {
	a := account{name: "root", home: "/root", shell: defaultShell}
	if line, ok := findLine(passwd, 2, "0", 7); ok {
		f := strings.Split(line, ":")
		a.name, a.home, a.shell = f[0], f[5], f[6]
	}
	return a
}

func reservedID(id int) bool {
	return id < firstUID || id == 65534 || id == 65535 || id > 1<<31-1
}

// validName is what useradd(8) takes, from lib/chkname.c of shadow 4.15, without
// the trailing dollar of machine accounts: not fully numeric, not "." or "..".
var validName = regexp.MustCompile(`^[a-zA-Z0-9_.][a-zA-Z0-9_.-]{0,31}$`)
var numericName = regexp.MustCompile(`^[0-9]+$`)

func usableName(name string) bool {
	return validName.MatchString(name) && !numericName.MatchString(name) && name != "." && name != ".."
}

// freeName is the wanted name, or the first of the spare ones that is not taken.
func freeName(want string, taken func(string) bool) (string, error) {
	if usableName(want) && !taken(want) {
		return want, nil
	}
	name := spareName
	for i := 2; i < 100; i++ {
		if !taken(name) {
			return name, nil
		}
		name = spareName + strconv.Itoa(i)
	}
	return "", fmt.Errorf("the image has taken %s and every name up to %s", spareName, name)
}

func loginShell(shell string, shells func(string) bool) bool {
	return shell != "" && !strings.HasSuffix(shell, "/nologin") && !strings.HasSuffix(shell, "/false") && shells(shell)
}

func chooseShell(shells func(string) bool) string {
	if shells("/bin/bash") {
		return "/bin/bash"
	}
	return defaultShell
}

// findLine finds the first line of an account file that has at least n fields and
// the value in one of them.
func findLine(content string, field int, value string, n int) (string, bool) {
	for line := range strings.Lines(content) {
		line = strings.TrimSuffix(line, "\n")
		f := strings.Split(line, ":")
		if len(f) >= n && f[field] == value {
			return line, true
		}
	}
	return "", false
}

func addLine(content, line string) string {
	if content != "" && !strings.HasSuffix(content, "\n") {
		content += "\n"
	}
	return content + line + "\n"
}

// sudoersFile lets the user do everything without a password. The uid needs no
// quoting, see sudoers(5).
func sudoersFile(uid int) string {
	return fmt.Sprintf("# made by banger at boot\n#%d ALL=(ALL:ALL) NOPASSWD: ALL\n", uid)
}
