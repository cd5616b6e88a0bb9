package boot

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"banger/internal/guest/wire"
)

const (
	testPasswd = "root:x:0:0:root:/root:/bin/bash\nwww-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
	testGroup  = "root:x:0:\nwww-data:x:33:\nstaff:x:50:\nusers:x:100:\nnogroup:x:65534:\n"
	testShadow = "root:*:19000:0:99999:7:::\nwww-data:*:19000:0:99999:7:::\n"
)

func testFiles(passwd, group string) accountFiles {
	return accountFiles{
		passwd: testPasswd + passwd, group: testGroup + group, shadow: testShadow, gshadow: "root:*::\n",
		hasShadow: true, hasGShadow: true,
	}
}

func shellsAre(names ...string) func(string) bool {
	return func(path string) bool { return slices.Contains(names, path) }
}

func TestResolveUser(t *testing.T) {
	both := shellsAre("/bin/bash", "/bin/sh", "/usr/bin/zsh")
	tests := []struct {
		name   string
		want   wire.User
		in     accountFiles
		shells func(string) bool
		out    account
		added  []string // lines that are new in any of the files
	}{
		{
			name: "the caller", want: wire.User{Name: "alice", UID: 1000, GID: 1000}, in: testFiles("", ""),
			out:   account{"alice", 1000, 1000, "/home/alice", "/bin/bash"},
			added: []string{"alice:x:1000:1000::/home/alice:/bin/bash", "alice:x:1000:", "alice:*:::::::", "alice:!::"},
		},
		{
			name: "root stays root", want: wire.User{Name: "root", UID: 0, GID: 0}, in: testFiles("", ""),
			out: account{"root", 0, 0, "/root", "/bin/bash"},
		},
		{
			name: "uid 0 of another name is root", want: wire.User{Name: "toor", UID: 0, GID: 0}, in: testFiles("", ""),
			out: account{"root", 0, 0, "/root", "/bin/bash"},
		},
		{
			name: "a low uid", want: wire.User{Name: "builder", UID: 999, GID: 999}, in: testFiles("", ""),
			out:   account{"builder", 1000, 1000, "/home/builder", "/bin/bash"},
			added: []string{"builder:x:1000:1000::/home/builder:/bin/bash", "builder:x:1000:", "builder:*:::::::", "builder:!::"},
		},
		{
			name: "a low uid with a name of the image", want: wire.User{Name: "www-data", UID: 33, GID: 33}, in: testFiles("", ""),
			out:   account{"banger", 1000, 1000, "/home/banger", "/bin/bash"},
			added: []string{"banger:x:1000:1000::/home/banger:/bin/bash", "banger:x:1000:", "banger:*:::::::", "banger:!::"},
		},
		{
			name: "nobody", want: wire.User{Name: "nobody", UID: 65534, GID: 65534}, in: testFiles("", ""),
			out:   account{"banger", 1000, 1000, "/home/banger", "/bin/bash"},
			added: []string{"banger:x:1000:1000::/home/banger:/bin/bash", "banger:x:1000:", "banger:*:::::::", "banger:!::"},
		},
		{
			name: "a name of the image with another uid", want: wire.User{Name: "www-data", UID: 1005, GID: 1005}, in: testFiles("", ""),
			out:   account{"banger", 1005, 1005, "/home/banger", "/bin/bash"},
			added: []string{"banger:x:1005:1005::/home/banger:/bin/bash", "banger:x:1005:", "banger:*:::::::", "banger:!::"},
		},
		{
			name: "the spare name is taken too", want: wire.User{Name: "www-data", UID: 1005, GID: 1005},
			in:    testFiles("banger:x:1000:1000::/home/banger:/bin/bash\nbanger2:x:1001:1001::/:/bin/sh\n", ""),
			out:   account{"banger3", 1005, 1005, "/home/banger3", "/bin/bash"},
			added: []string{"banger3:x:1005:1005::/home/banger3:/bin/bash", "banger3:x:1005:", "banger3:*:::::::", "banger3:!::"},
		},
		{
			name: "a name that useradd refuses", want: wire.User{Name: `CORP\alice`, UID: 1000, GID: 1000}, in: testFiles("", ""),
			out:   account{"banger", 1000, 1000, "/home/banger", "/bin/bash"},
			added: []string{"banger:x:1000:1000::/home/banger:/bin/bash", "banger:x:1000:", "banger:*:::::::", "banger:!::"},
		},
		{
			name: "a name that would add a line", want: wire.User{Name: "a:x:0:0::/:/bin/sh\nb", UID: 1000, GID: 1000}, in: testFiles("", ""),
			out:   account{"banger", 1000, 1000, "/home/banger", "/bin/bash"},
			added: []string{"banger:x:1000:1000::/home/banger:/bin/bash", "banger:x:1000:", "banger:*:::::::", "banger:!::"},
		},
		{
			name: "the uid has an account", want: wire.User{Name: "alice", UID: 1000, GID: 1000},
			in:    testFiles("ubuntu:x:1000:1000:Ubuntu:/home/ubuntu:/usr/bin/zsh\n", "ubuntu:x:1000:\n"),
			out:   account{"ubuntu", 1000, 1000, "/home/ubuntu", "/usr/bin/zsh"},
			added: []string{"ubuntu:*:::::::"},
		},
		{
			name: "its login shell is gone", want: wire.User{Name: "alice", UID: 1000, GID: 1000},
			in:    testFiles("alice:x:1000:100:A:/home/alice:/usr/bin/fish\n", ""),
			out:   account{"alice", 1000, 100, "/home/alice", "/bin/bash"},
			added: []string{"alice:x:1000:100:A:/home/alice:/bin/bash", "alice:*:::::::"},
		},
		{
			name: "its login shell turns away", want: wire.User{Name: "svc", UID: 2000, GID: 2000},
			in:    testFiles("svc:*:2000:2000::/srv:/usr/sbin/nologin\n", ""),
			out:   account{"svc", 2000, 2000, "/srv", "/bin/bash"},
			added: []string{"svc:*:2000:2000::/srv:/bin/bash"},
		},
		{
			name: "no bash", want: wire.User{Name: "alice", UID: 1000, GID: 1000}, in: testFiles("", ""), shells: shellsAre("/bin/sh"),
			out:   account{"alice", 1000, 1000, "/home/alice", "/bin/sh"},
			added: []string{"alice:x:1000:1000::/home/alice:/bin/sh", "alice:x:1000:", "alice:*:::::::", "alice:!::"},
		},
		{
			name: "a low gid", want: wire.User{Name: "alice", UID: 1000, GID: 100}, in: testFiles("", ""),
			out:   account{"alice", 1000, 1000, "/home/alice", "/bin/bash"},
			added: []string{"alice:x:1000:1000::/home/alice:/bin/bash", "alice:x:1000:", "alice:*:::::::", "alice:!::"},
		},
		{
			name: "the gid has a group", want: wire.User{Name: "alice", UID: 1000, GID: 2000}, in: testFiles("", "dev:x:2000:\n"),
			out:   account{"alice", 1000, 2000, "/home/alice", "/bin/bash"},
			added: []string{"alice:x:1000:2000::/home/alice:/bin/bash", "alice:*:::::::"},
		},
		{
			name: "a group has the name", want: wire.User{Name: "staff", UID: 1000, GID: 1000}, in: testFiles("", ""),
			out:   account{"staff", 1000, 1000, "/home/staff", "/bin/bash"},
			added: []string{"staff:x:1000:1000::/home/staff:/bin/bash", "banger:x:1000:", "staff:*:::::::", "banger:!::"},
		},
		{
			name: "no files at all", want: wire.User{Name: "alice", UID: 1000, GID: 1000}, in: accountFiles{}, shells: shellsAre(),
			out:   account{"alice", 1000, 1000, "/home/alice", "/bin/sh"},
			added: []string{"root:x:0:0:root:/root:/bin/sh", "alice:*:1000:1000::/home/alice:/bin/sh", "alice:x:1000:"},
		},
		{
			name: "no newline at the end, and lines that are none", want: wire.User{Name: "alice", UID: 1000, GID: 1000},
			in:    accountFiles{passwd: "root:x:0:0:root:/root:/bin/bash\n+::::::\n1000:1000\nalice:x", hasShadow: true},
			out:   account{"alice", 1000, 1000, "/home/alice", "/bin/bash"},
			added: []string{"alice:x:1000:1000::/home/alice:/bin/bash", "alice:x:1000:", "alice:*:::::::"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			shells := tt.shells
			if shells == nil {
				shells = both
			}
			a, out, err := resolveUser(tt.want, tt.in, shells)
			if err != nil {
				t.Fatal(err)
			}
			if a != tt.out {
				t.Errorf("account %+v, want %+v", a, tt.out)
			}
			if got := addedLines(tt.in, out); !slices.Equal(got, tt.added) {
				t.Errorf("added lines\n %q, want\n %q", got, tt.added)
			}
			b, again, err := resolveUser(tt.want, out, shells)
			if err != nil || b != a || again != out {
				t.Errorf("the second boot differs: %+v, %v\n%+v\n%+v", b, err, again, out)
			}
			// A crash may have left any of the files as it was: the next boot ends at
			// the same place as long as passwd, written last, is one of them.
			half := out
			half.passwd = tt.in.passwd
			c, completed, err := resolveUser(tt.want, half, shells)
			if err != nil || c != a || completed != out {
				t.Errorf("the boot after a crash differs: %+v, %v\n%+v\n%+v", c, err, completed, out)
			}
		})
	}
}

// addedLines lists the lines of passwd, group, shadow, gshadow that are not in before.
func addedLines(before, after accountFiles) (added []string) {
	pairs := [][2]string{{before.passwd, after.passwd}, {before.group, after.group}, {before.shadow, after.shadow}, {before.gshadow, after.gshadow}}
	for _, p := range pairs {
		had := strings.Split(p[0], "\n")
		for _, line := range strings.Split(p[1], "\n") {
			if line != "" && !slices.Contains(had, line) {
				added = append(added, line)
			}
		}
	}
	return added
}

func TestResolveUserErrors(t *testing.T) {
	in := testFiles("", "")
	var b strings.Builder
	b.WriteString(in.passwd + "banger:x:3000:1::/:/bin/sh\n")
	for i := 2; i < 100; i++ {
		b.WriteString(fmt.Sprintf("banger%d:x:3000:1::/:/bin/sh\n", i))
	}
	in.passwd = b.String()
	if _, out, err := resolveUser(wire.User{Name: "-bad", UID: 1000, GID: 1000}, in, shellsAre()); err == nil || out != in {
		t.Errorf("no name was left: %v", err)
	}
	odd := testFiles("odd:x:1000:many::/:/bin/sh\n", "")
	if _, _, err := resolveUser(wire.User{Name: "alice", UID: 1000, GID: 1000}, odd, shellsAre()); err == nil {
		t.Error("a group that is no number was accepted")
	}
}

func TestReservedID(t *testing.T) {
	for id, want := range map[int]bool{
		-1: true, 1: true, 999: true, 1000: false, 60001: false, 65533: false, 65534: true, 65535: true, 65536: false,
		math.MaxInt32: false, math.MaxInt32 + 1: true, math.MaxUint32: true,
	} {
		if got := reservedID(id); got != want {
			t.Errorf("reservedID(%d) = %v", id, got)
		}
	}
}

func TestUsableName(t *testing.T) {
	for name, want := range map[string]bool{
		"alice": true, "a": true, "Alice": true, "john.doe": true, "_x": true, "a-b_c9": true, "9lives": true, strings.Repeat("a", 32): true,
		"": false, "-a": false, "1000": false, ".": false, "..": false, "a b": false, "a:b": false, "a/b": false, "ärger": false,
		"alice@corp": false, "a\n": false, "machine$": false, strings.Repeat("a", 33): false,
	} {
		if got := usableName(name); got != want {
			t.Errorf("usableName(%q) = %v", name, got)
		}
	}
}
