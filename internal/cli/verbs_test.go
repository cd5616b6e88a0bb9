package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
	"banger/internal/guest/wire"
)

// quiet fakes: a repository with a VM, and a command that does nothing.
func withShop(t *testing.T) *fakeDaemon {
	d := newFake(t)
	shop := d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_RUNNING, Image: "debian-bookworm", Cpus: 4, Memory: 4 << 30, Disk: 20 << 30,
		Workspace: &bangerv1.Workspace{HostPath: "/home/ann/shop", GuestPath: "/home/ann/shop"}})
	d.found = func(string) (*bangerv1.FindWorkspaceResponse, error) {
		return &bangerv1.FindWorkspaceResponse{Repository: "/home/ann/shop", Vm: shop, Prefix: "lib/deep"}, nil
	}
	d.prepared = &bangerv1.Prepared{HeadShort: "3f2c1ab", Changed: 2, Workspace: shop.Workspace}
	d.exec = func(x wire.Exec, g *guestEnd) { g.started(); g.exit(0) }
	return d
}

// TestRequests: what the arguments of each verb become.
func TestRequests(t *testing.T) {
	here := t.TempDir()
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"run --rm=false -- uname -a", 0, `create {}` + "\n" + `exec quiet-fox ["uname" "-a"] stdin`},
		{"run debian-bookworm --name box --cpus 2 --memory 512M --disk 1.5G -- true", 0,
			`create {"name":"box","image":"debian-bookworm","cpus":2,"memory":536870912,"disk":1610612736}` + "\n" + `exec box ["true"] stdin`},
		{"run --image other --ready agent -i=false -- true", 0, `create {"image":"other","ready":1}` + "\n" + `exec quiet-fox ["true"]`},
		{"run -d --ready system", 0, `create {"ready":2}`},
		{"vm run -d", 0, `create {}`},
		{"run -t -i=false -u ann:100 -w /srv -e A=1 -e B= -e C -e UNSET -- make", 0,
			`create {}` + "\n" + `exec quiet-fox ["make"] dir=/srv user=ann:100 env=TERM=xterm A=1 B= C=from-here tty 80x24`},
		{"create --no-start --name box", 0, `create {"name":"box","no_start":true}`},
		{"create some-image", 0, `create {"image":"some-image"}`},
		{"exec shop ls -l --rm -d", 0, `exec shop ["ls" "-l" "--rm" "-d"]`},
		{"exec shop -- ls", 0, `exec shop ["ls"]`},
		{"exec -i shop -- sh -c --", 0, `exec shop ["sh" "-c" "--"] stdin`},
		{"exec id-shop true", 0, `exec shop ["true"]`},
		{"exec -- git status", 0, `exec shop ["git" "status"] dir=/home/ann/shop/lib/deep`},
		{"exec -w .. -- pwd", 0, `exec shop ["pwd"] dir=/home/ann/shop/lib`},
		{"up . -- make test", 0, `prepare {"ref":"id-shop","repository":"/home/ann/shop"}` + "\n" +
			`exec shop ["make" "test"] dir=/home/ann/shop/lib/deep stdin`},
		{"run . -- make", 0, `prepare {"ref":"id-shop","repository":"/home/ann/shop"}` + "\n" +
			`exec shop ["make"] dir=/home/ann/shop/lib/deep stdin`},
		{"up -d --include-untracked", 0, `prepare {"ref":"id-shop","repository":"/home/ann/shop","include_untracked":true}`},
		{"up -d --name shop", 0, `prepare {"ref":"id-shop","repository":"/home/ann/shop"}`},
		{"start", 0, `start {"ref":"shop"}`},
		{"start shop", 0, `start {"ref":"shop"}`},
		{"stop shop", 0, `stop {"ref":"shop","timeout_seconds":30}`},
		{"stop --timeout 2m shop", 0, `stop {"ref":"shop","timeout_seconds":120}`},
		{"stop --timeout 0s shop shop", 0, `stop {"ref":"shop","timeout_seconds":-1}`},
		{"rm shop", 0, `delete {"ref":"shop"} holds:0`},
		{"delete -f shop", 0, `delete {"ref":"shop","force":true} holds:0`},
		{"vm rm -f shop", 0, `delete {"ref":"shop","force":true} holds:0`},
		{"show", 0, `show id-shop`},
		{"inspect shop", 0, `show shop`},
		{"diff", 0, `export {"ref":"id-shop"}`},
		{"diff shop", 0, `export {"ref":"shop"}`},
		{"workspace export shop", 0, `export {"ref":"shop"}`},
		{"workspace prepare", 0, `prepare {"ref":"id-shop","repository":"` + here + `"}`},
		{"image pull", 0, `image pull {}`},
		{"kernel pull debian-cloud", 0, `kernel pull {"name":"debian-cloud"}`},
	} {
		t.Run(c.args, func(t *testing.T) {
			t.Chdir(here)
			d := withShop(t)
			call := d.call()
			call.env = []string{"C=from-here"}
			code := call.start(strings.Fields(c.args)...).wait()
			if code != c.code {
				t.Errorf("exit %d, not %d: %s", code, c.code, call.err.String())
			}
			want(t, "requests", d.called(), c.want)
		})
	}
}

// TestUsage: what cannot be meant is refused before anything is asked of the daemon.
func TestUsage(t *testing.T) {
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"up", 125, "a shell needs a terminal: give a command, or -d\nhint: banger up -- COMMAND"},
		{"run", 125, "a shell needs a terminal"},
		{"run .", 125, "a shell needs a terminal"},
		{"up . make test", 125, `"make" is one argument too many: a command comes after --` + "\nhint: banger up . -- make test"},
		{"run img ls", 125, "hint: banger run img -- ls"},
		{"run --", 125, "no command after --"},
		{"up -d -- make", 125, "-d and a command exclude each other"},
		{"run -d --rm", 125, "-d and --rm exclude each other"},
		{"run --image a b -- true", 125, "two images are named: b and a"},
		{"run --include-untracked -- true", 125, "--include-untracked needs a repository"},
		{"up --nope", 125, "unknown flag: --nope\nhint: banger up --help"},
		{"up /does/not/exist -- true", 125, "there is no /does/not/exist"},
		{"run --name Bad_Name -- true", 125, `banger: --name: "Bad_Name" is no name: use lower-case letters`},
		{"run --memory 512 -- true", 125, `lacks a unit`},
		{"run --cpus 0 -- true", 125, "from 1 to"},
		{"run --cpus 2x -- true", 125, `"2x" is no number`},
		{"run --disk 0G -- true", 125, "more than nothing"},
		{"run --ready never -- true", 125, "it is agent or system"},
		{"run -e =x -- true", 125, `-e "=x"`},
		{"run -w sub -- true", 125, "a relative directory needs a repository"},
		{"exec", 125, "VM is missing"},
		{"exec shop", 125, "a command is missing\nhint: banger exec shop COMMAND"},
		{"exec shop --", 125, "a command is missing"},
		{"create ./x", 2, "./x is a path, and create takes an image\nhint: banger up -d ./x"},
		{"create a b", 2, `"b" is one argument too many`},
		{"create --memory lots", 2, "no size"},
		{"rm", 2, "VM is missing"},
		{"stop --timeout 30 shop", 2, "lacks a unit"},
		{"stop --timeout -1s shop", 2, "negative"},
		{"ps shop", 2, `"shop" is one argument too many`},
		{"ps --format yaml", 2, "it is table or json"},
		{"op wait", 2, "ID is missing"},
		{"imag", 2, "banger has no command \"imag\"\nhint: banger image"},
		{"image frobnicate", 2, `banger image has no command "frobnicate"`},
		{"help nope", 2, `there is no command "nope"`},
	} {
		t.Run(c.args, func(t *testing.T) {
			d := newFake(t)
			r := d.run(strings.Fields(c.args)...)
			want(t, "exit code", r.code, c.code)
			want(t, "stdout", r.out, "")
			contains(t, "stderr", r.err, "banger: ", c.says, "\nhint: ")
			want(t, "requests", d.called(), "")
		})
	}
}

// TestErrors: codes become exit codes, in both kinds of commands.
func TestErrors(t *testing.T) {
	for _, c := range []struct {
		code  api.Code
		plain int
	}{
		{api.Invalid, 2}, {api.Ambiguous, 2}, {api.NotFound, 3}, {api.NotReady, 4}, {api.Busy, 5}, {api.Refused, 5}, {api.Exists, 5},
		{api.NoSpace, 1}, {api.Unresponsive, 1}, {api.UnknownMethod, 1}, {api.Internal, 1},
	} {
		t.Run(string(c.code), func(t *testing.T) {
			d := newFake(t)
			d.refuse["create"] = api.Errorf(c.code, "cannot create box: it is so").WithHint("banger doctor")
			r := d.run("create")
			want(t, "create", r.code, c.plain)
			want(t, "stderr", r.err, "banger: cannot create box: it is so\nhint: banger doctor\n")
			want(t, "run", d.run("run", "--", "true").code, 125)
			r = d.run("create", "--format", "json")
			want(t, "json", r, result{c.plain, "", `{"error":{"code":"` + string(c.code) + `","hint":"banger doctor","message":"cannot create box: it is so"}}` + "\n"})
			// The same from an operation that fails.
			delete(d.refuse, "create")
			d.script["create"] = func(op *fakeOp) { op.fail(c.code, "no: \x1b[31mred\nsecond line", "") }
			r = d.run("create")
			want(t, "failed operation", r, result{c.plain, "", "banger: no: \\x1b[31mred\n  second line\n"})
		})
	}
}

func TestPs(t *testing.T) {
	d := newFake(t)
	header := "NAME  STATE  IMAGE  CPUS  MEM  DISK  CHANGES  CREATED\n"
	want(t, "no VM", d.run("ps"), result{0, header, ""})
	want(t, "no VM, json", d.run("ps", "--format", "json").out, "[]\n")
	d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_RUNNING, Image: "debian-bookworm", Cpus: 4, Memory: 4 << 30, Disk: 20 << 30,
		Workspace: &bangerv1.Workspace{Changes: 1, ChangesAt: timestamppb.New(now().Add(-5 * time.Minute))}})
	d.add(&bangerv1.VM{Name: "box", State: bangerv1.VM_STOPPED, Image: "e\x1b[0mvil", Cpus: 1, Memory: 512 << 20, Disk: 1 << 30,
		Problem: "its disk is gone", Workspace: &bangerv1.Workspace{}})
	r := d.run("ps")
	want(t, "stdout", r.out, ""+
		"NAME  STATE     IMAGE            CPUS  MEM   DISK  CHANGES         CREATED\n"+
		"box   stopped!  e\\x1b[0mvil      1     512M  1G    -               2h ago\n"+
		"shop  running   debian-bookworm  4     4G    20G   1 file, 5m ago  2h ago\n")
	want(t, "stderr", r.err, "box: its disk is gone\n")
	for _, args := range [][]string{{"ps", "-q"}, {"ls", "--quiet"}, {"vm", "list", "-q"}} {
		want(t, strings.Join(args, " "), d.run(args...), result{0, "box\nshop\n", ""})
	}
	j := d.run("ps", "--format", "json").out
	contains(t, "json", j, `"name": "box"`, `"memory": "536870912"`, `"state": "RUNNING"`, `"changes_at": "2026-11-24T11:55:00Z"`, `"problem": ""`)
	if strings.ContainsRune(j, 0x1b) {
		t.Error("an escape came through in JSON")
	}
}

func TestShow(t *testing.T) {
	d := newFake(t)
	d.add(&bangerv1.VM{Name: "box", State: bangerv1.VM_FAILED, LastError: "cannot detach disk\n\x07busy", Cpus: 1, Memory: 1 << 30, Disk: 1 << 30,
		Handles: map[string]string{"pid": "7", "boot id": "x"}})
	r := d.run("show", "box")
	want(t, "show", r, result{0, "name:        box\nid:          id-box\nstate:       failed\nlast error:  cannot detach disk \\x07busy\n" +
		"cpus:        1\nmemory:      1G\ndisk:        1G\ncreated:     2h ago\nboot id:     x\npid:         7\n", ""})
	contains(t, "json", d.run("show", "box", "--format", "json").out, `"last_error": "cannot detach disk\n\u0007busy"`)
}

// TestSeveral: side by side, the good ones go on, the worst code is returned.
func TestSeveral(t *testing.T) {
	d := newFake(t)
	for _, name := range []string{"a", "b", "c"} {
		d.add(&bangerv1.VM{Name: name})
	}
	// Each stop waits until all three are under way.
	var under = make(chan struct{}, 3)
	all := make(chan struct{})
	go func() {
		for range 3 {
			<-under
		}
		close(all)
	}()
	d.script["stop"] = func(op *fakeOp) {
		under <- struct{}{}
		select {
		case <-all:
		case <-time.After(10 * time.Second):
			t.Error("they do not run side by side")
		}
		if m, _ := op.get(); m.Target == "b" {
			op.fail(api.Refused, "cannot stop b: it is stuck", "banger show b")
			return
		}
		op.step(1, 2, "shutdown")
	}
	r := d.run("stop", "a", "b", "nope", "c", "a")
	want(t, "exit code", r.code, 5)
	contains(t, "stdout", r.out, "a\n", "c\n")
	want(t, "stdout", len(r.out), len("a\nc\n"))
	contains(t, "stderr", r.err, "banger: cannot stop b: it is stuck\nhint: banger show b\n", "banger: no VM named nope\nhint: banger ps\n")
	want(t, "only not found", d.run("rm", "x", "y").code, 3)
}

// TestChangedJSON: one array, in the order of the arguments, of what was done.
func TestChangedJSON(t *testing.T) {
	d := newFake(t)
	for _, name := range []string{"a", "b"} {
		d.add(&bangerv1.VM{Name: name, State: bangerv1.VM_RUNNING})
	}
	for _, verb := range []string{"start", "stop"} {
		r := d.run(verb, "-q", "--format", "json", "b", "nope", "a")
		want(t, "exit code", r.code, 3)
		var vms []struct{ ID, Name string }
		if err := json.Unmarshal([]byte(r.out), &vms); err != nil {
			t.Fatalf("%s: %v", r.out, err)
		}
		want(t, verb, fmt.Sprint(vms), "[{id-b b} {id-a a}]")
	}
	want(t, "rm", d.run("rm", "--format", "json", "b", "nope", "a").out, "[\n  \"b\",\n  \"a\"\n]\n")
	want(t, "none", d.run("rm", "--format", "json", "b").out, "[]\n")
}

// TestSuggestions: what is near enough to have been meant.
func TestSuggestions(t *testing.T) {
	d := newFake(t)
	for name, hint := range map[string]string{
		"foo": "--help", "strat": "start", "xec": "exec", "creat": "create", "zz": "--help", "cp": "--help", "image pul": "image pull",
	} {
		r := d.run(strings.Fields(name)...)
		want(t, name, r.code, 2)
		contains(t, name, r.err, "hint: banger "+hint+"\n")
	}
}

// TestNoVMNamed: the VM of the repository here, or words about why there is none.
func TestNoVMNamed(t *testing.T) {
	d := newFake(t)
	for _, verb := range []string{"start", "stop", "show", "diff", "apply"} {
		r := d.run(verb)
		want(t, verb+" outside", r.code, 2)
		contains(t, verb, r.err, "no VM is named, and this is no repository that could have one: ", "hint: banger ps")
	}
	want(t, "exec outside", d.run("exec", "--", "true").code, 125)
	d.found = func(path string) (*bangerv1.FindWorkspaceResponse, error) {
		return &bangerv1.FindWorkspaceResponse{Repository: "/srv/repo"}, nil
	}
	r := d.run("stop")
	want(t, "no VM", r, result{3, "", "banger: no VM is named, and /srv/repo has none\nhint: banger up\n"})
}

func TestLists(t *testing.T) {
	d := newFake(t)
	d.images = []*bangerv1.Image{
		{Name: "debian-bookworm", Kernel: "debian-cloud", Size: 900 << 20, InUse: 2, CreatedAt: timestamppb.New(now().Add(-72 * time.Hour)), Source: "Debian bookworm"},
		{Name: "other", Available: true, Source: "Debian trixie"},
	}
	want(t, "image ls", d.run("image", "ls").out, ""+
		"NAME             STATE          KERNEL        SIZE  USED BY  CREATED  SOURCE\n"+
		"debian-bookworm  here           debian-cloud  900M  2 VMs    3d ago   Debian bookworm\n"+
		"other            can be pulled  -             -     -        -        Debian trixie\n")
	want(t, "image ls -q", d.run("image", "ls", "-q").out, "debian-bookworm\nother\n")
	d.kernels = []*bangerv1.Kernel{{Name: "debian-cloud", Version: "6.1.0-40", Size: 90 << 20, InUse: 1, CreatedAt: timestamppb.New(now())}}
	want(t, "kernel ls", d.run("kernel", "ls").out, ""+
		"NAME          STATE  VERSION   SIZE  USED BY  CREATED  SOURCE\n"+
		"debian-cloud  here   6.1.0-40  90M   1 VM     0s ago\n")
	want(t, "image pull", d.run("image", "pull").out, "debian-bookworm\n")
	want(t, "kernel pull", d.run("kernel", "pull", "--format", "json").code, 0)
}

func TestDoctor(t *testing.T) {
	checks := []*bangerv1.Check{
		{Name: "git", Purpose: "up, diff, apply", Result: bangerv1.Check_OK, Finding: "2.39.5"},
		{Name: "kvm", Purpose: "speed", Result: bangerv1.Check_WARN, Finding: "no vmx or svm", Fix: "enable it"},
	}
	d := newFake(t)
	run := func(args ...string) result {
		var out, errs safeBuffer
		a := newApp(strings.NewReader(""), &out, &errs, nil)
		a.signals = watchSignals(func(chan<- os.Signal) func() { return func() {} })
		defer a.signals.stop()
		a.doctor = func(context.Context, config.Layout) []*bangerv1.Check { return checks }
		return result{a.run(append([]string{"doctor"}, args...)), out.String(), errs.String()}
	}
	want(t, "with a warning", run(), result{0, "ok    git  2.39.5\nwarn  kvm  no vmx or svm\n           needed for: speed\n           mend it with: enable it\n", ""})
	checks[0].Result = bangerv1.Check_FAIL
	want(t, "with a failure", run("--format", "json").code, 4)
	want(t, "requests", d.called(), "")
}

func TestDiff(t *testing.T) {
	d := withShop(t)
	patch := "diff --git a/x b/x\n\x00\xff\x1b[31mbinary\n"
	d.patch = []*bangerv1.ExportChunk{{Meta: &bangerv1.ExportMeta{Head: "abc"}, Patch: []byte(patch[:20])}, {Patch: []byte(patch[20:])}}
	want(t, "diff", d.run("diff"), result{0, patch, ""})
	d.refuse["export"] = api.Errorf(api.Refused, "shop is stopped").WithHint("banger start shop")
	r := d.run("diff", "shop")
	want(t, "half a diff", r.code, 5)
}

func TestPatchOnTerminal(t *testing.T) {
	var b strings.Builder
	p := &patchPrinter{w: &b, colour: true}
	for _, piece := range []string{"--- a/x\n+++ b", "/x\n@@ -1 +1 @@\n-old\n+n\x1b]0;evil\x07ew\n keep", " \u202e"} {
		p.Write([]byte(piece))
	}
	p.flush()
	want(t, "patch", b.String(), "\x1b[1m--- a/x\x1b[0m\n\x1b[1m+++ b/x\x1b[0m\n\x1b[36m@@ -1 +1 @@\x1b[0m\n\x1b[31m-old\x1b[0m\n"+
		"\x1b[32m+n\\x1b]0;evil\\x07ew\x1b[0m\n keep \\u202e")
}

func TestVersion(t *testing.T) {
	d := newFake(t)
	d.close() // it needs no daemon
	contains(t, "version", d.run("version").out, "banger "+release, "go1.")
	contains(t, "json", d.run("version", "--format", "json").out, `"version": `)
	want(t, "as a flag", d.run("--version"), d.run("version"))
	want(t, "as a flag, json", d.run("--version", "--format", "json"), d.run("version", "--format", "json"))
}

func TestClean(t *testing.T) {
	for in, out := range map[string]string{
		"plain ä 日本\n\tx": "plain ä 日本\n\tx",
		"\x1b]52;c;x\x07": `\x1b]52;c;x\x07`,
		"a\rb\x7f\u009b":  `a\x0db\x7f\x9b`,
		"\u202eabc\u200b": `\u202eabc\u200b`,
	} {
		want(t, in, clean(in), out)
	}
	want(t, "line", cleanLine("a\nb\tc"), "a b c")
	want(t, "json", cleanJSON("\"\u009b\U000e0001\""), `"\u009b\udb40\udc01"`)
}

// TestLongStateDir: a socket's path has 107 bytes at most; ours may have more.
func TestLongStateDir(t *testing.T) {
	d := newFake(t)
	d.close()
	d.layout.Root = filepath.Join(t.TempDir(), strings.Repeat("long", 20), strings.Repeat("path", 20))
	if err := d.layout.Prepare(); err != nil {
		t.Fatal(err)
	}
	d.listen()
	t.Cleanup(d.close)
	want(t, "ps -q", d.run("ps", "-q"), result{0, "", ""})
}
