package config

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"banger/api"
	"banger/test/need"
)

var testHost = Host{CPUs: 16, Memory: 64 << 30}

func TestDefaultsFollowTheHost(t *testing.T) {
	for _, c := range []struct {
		host   Host
		cpus   int
		memory int64
	}{
		{Host{CPUs: 16, Memory: 64 << 30}, 4, 4 << 30},
		{Host{CPUs: 2, Memory: 8 << 30}, 2, 2 << 30},
		{Host{CPUs: 3, Memory: 4<<30 - 12345}, 3, 1023 << 20}, // whole MiB
		{Host{CPUs: 1, Memory: 256 << 20}, 1, MinMemory},
		{Host{}, 1, MinMemory},
	} {
		got := Default(c.host)
		if got.CPUs != c.cpus || got.Memory != c.memory || got.Disk != 20<<30 {
			t.Errorf("Default(%+v) = %+v, want %d CPUs and %d bytes", c.host, got, c.cpus, c.memory)
		}
		if err := errors.Join(ValidateCPUs(got.CPUs), ValidateMemory(got.Memory), ValidateDisk(got.Disk)); err != nil {
			t.Errorf("Default(%+v) is not valid: %v", c.host, err)
		}
	}
}

func TestParse(t *testing.T) {
	got, err := Parse("config.toml", []byte(`# mine
image = "alpine"
cpus = 8
memory = "1.5G"
disk = "100GiB"
network = "lan"
log_level = "debug"
kvm = "off"
disk_driver = "dm-snapshot"
`), testHost)
	if err != nil {
		t.Fatal(err)
	}
	want := Config{Image: "alpine", Kernel: "debian-cloud", CPUs: 8, Memory: 1536 << 20, Disk: 100 << 30, Network: "lan", LogLevel: slog.LevelDebug, KVM: KVMOff, DiskDriver: "dm-snapshot"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if got, err := Parse("config.toml", nil, testHost); err != nil || got != Default(testHost) {
		t.Errorf("an empty file gives %+v, %v", got, err)
	}
}

func TestParseNamesFileLineAndKey(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"image = \"x\"\nmemroy = \"4G\"\n", `c.toml:2: unknown key "memroy"`},
		{"a = 1\n\nb = 2\n", "c.toml:1: unknown key \"a\"\nc.toml:3: unknown key \"b\""},
		{"[vm]\ncpus = 2\n", `c.toml:1: unknown key "vm"`},
		{"\n\nmemory = \"4X\"\n", `c.toml:3: memory: `},
		{"memory = \"4096\"\n", `c.toml:1: memory: size "4096" lacks a unit`},
		{"memory = 4096\n", `c.toml:1: memory: it is a TOML integer, not of type string`},
		{"cpus = \"two\"\n", `c.toml:1: cpus: `},
		{"cpus = 0\n", `c.toml: cpus: a VM has from 1 to 255 CPUs`},
		{"kvm = \"on\"\n", `c.toml:1: kvm: "on" is none of auto, off`},
		{"disk_driver = \"zfs\"\n", `c.toml:1: disk_driver: "zfs" is none of auto, reflink, qcow2, dm-snapshot, copy`},
		{"network = \"wan\"\n", `c.toml:1: network: "wan" is none of none, internet, lan, host`},
		{"log_level = \"loud\"\n", `c.toml:1: log_level: `},
		{"image = \"\"\n", `c.toml: image and kernel`},
		{"image = \"x\n", `c.toml:1: `},
		{"memory = \"64M\"\n", `c.toml:1: memory: a VM needs at least 128M`},
		{"disk = \"1K\"\n", `c.toml:1: disk: a disk has from 64M to 1T`},
	} {
		_, err := Parse("c.toml", []byte(c.text), testHost)
		if err == nil || !strings.HasPrefix(err.Error(), c.want) || api.CodeOf(err) != api.Invalid {
			t.Errorf("Parse(%q) = %v (%s), want %s…", c.text, err, api.CodeOf(err), c.want)
		}
	}
}

// clearEnv leaves nothing of the environment that the package reads.
func clearEnv(t *testing.T) {
	for _, name := range []string{"BANGER_CONFIG", "BANGER_STATE_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "HOME"} {
		t.Setenv(name, "")
	}
}

func TestLoadFindsTheFile(t *testing.T) {
	clearEnv(t)
	if c, err := Load(testHost); err != nil || c != Default(testHost) {
		t.Errorf("without a home: %+v, %v", c, err)
	}
	home := t.TempDir()
	t.Setenv("HOME", home)
	if c, err := Load(testHost); err != nil || c != Default(testHost) {
		t.Errorf("without a file: %+v, %v", c, err)
	}
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(home, ".config/banger/config.toml"), "cpus = 5\n")
	write(filepath.Join(home, "xdg/banger/config.toml"), "cpus = 6\n")
	write(filepath.Join(home, "my.toml"), "cpus = 7\n")
	for _, c := range []struct {
		xdg, own string
		cpus     int
	}{
		{"", "", 5},
		{"relative/xdg", "", 5},
		{filepath.Join(home, "xdg"), "", 6},
		{filepath.Join(home, "xdg"), filepath.Join(home, "my.toml"), 7},
	} {
		t.Setenv("XDG_CONFIG_HOME", c.xdg)
		t.Setenv("BANGER_CONFIG", c.own)
		if got, err := Load(testHost); err != nil || got.CPUs != c.cpus {
			t.Errorf("XDG_CONFIG_HOME=%q BANGER_CONFIG=%q: %d CPUs, %v; want %d", c.xdg, c.own, got.CPUs, err, c.cpus)
		}
	}
	t.Setenv("BANGER_CONFIG", filepath.Join(home, "absent.toml"))
	if _, err := Load(testHost); !errors.Is(err, fs.ErrNotExist) || api.CodeOf(err) != api.Invalid {
		t.Errorf("a missing BANGER_CONFIG gives %v", err)
	}
}

func TestDir(t *testing.T) {
	clearEnv(t)
	if l, err := Dir(); err == nil {
		t.Errorf("without HOME: %v", l)
	}
	t.Setenv("HOME", "/home/u")
	for _, c := range []struct{ own, xdg, want string }{
		{"", "", "/home/u/.local/state/banger"},
		{"", "rel", "/home/u/.local/state/banger"},
		{"", "/x", "/x/banger"},
		{"/s/b/", "/x", "/s/b"},
	} {
		t.Setenv("BANGER_STATE_DIR", c.own)
		t.Setenv("XDG_STATE_HOME", c.xdg)
		if l, err := Dir(); err != nil || l.Root != c.want {
			t.Errorf("%+v: %q, %v", c, l.Root, err)
		}
	}
	t.Setenv("BANGER_STATE_DIR", "here")
	if _, err := Dir(); api.CodeOf(err) != api.Invalid {
		t.Errorf("a relative BANGER_STATE_DIR gives %v", err)
	}
}

func TestPrepareMakesPrivateDirectories(t *testing.T) {
	l := Layout{Root: filepath.Join(t.TempDir(), "a/b/banger")}
	if err := l.Prepare(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(l.Root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := l.Prepare(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{l.Root, l.VMs(), l.Images(), l.Kernels(), l.Cache(), l.Lost(), l.Programs()} {
		st, err := os.Lstat(dir)
		if err != nil || !st.IsDir() || st.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", dir, st, err)
		}
	}
}

func TestPrepareRefusesWhatIsNotItsOwn(t *testing.T) {
	refused := func(l Layout, want string) {
		t.Helper()
		err := l.Prepare()
		if api.CodeOf(err) != api.Refused || !strings.Contains(err.Error(), want) || api.HintOf(err) == "" {
			t.Errorf("got %v (%s), want %q", err, api.CodeOf(err), want)
		}
	}
	base := t.TempDir()
	target := filepath.Join(base, "target")
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(base, "link")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	refused(Layout{Root: link}, "symbolic link")
	if st, err := os.Stat(target); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("the target was touched: %v, %v", st, err)
	}
	file := filepath.Join(base, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refused(Layout{Root: file}, "it is a file")
	ours := Layout{Root: filepath.Join(base, "ours")}
	if err := ours.Prepare(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(ours.VMs()); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, ours.VMs()); err != nil {
		t.Fatal(err)
	}
	refused(ours, "symbolic link")
	if err := (Layout{Root: "relative"}).Prepare(); api.CodeOf(err) != api.Invalid {
		t.Errorf("a relative root gives %v", err)
	}
	need.Need(t, "root") // a directory of another user
	foreign := filepath.Join(base, "foreign")
	if err := errors.Join(os.Mkdir(foreign, 0o700), os.Chown(foreign, 12345, 12345)); err != nil {
		t.Fatal(err)
	}
	refused(Layout{Root: foreign}, "belongs to uid 12345")
}

func TestInstanceStays(t *testing.T) {
	l := Layout{Root: t.TempDir()}
	ids := make(chan string, 8)
	for range cap(ids) {
		go func() {
			id, err := l.Instance()
			if err != nil {
				id = err.Error()
			}
			ids <- id
		}()
	}
	first := <-ids
	if !instanceID.MatchString(first) {
		t.Fatalf("instance id %q", first)
	}
	for range cap(ids) - 1 {
		if id := <-ids; id != first {
			t.Errorf("two ids: %q and %q", first, id)
		}
	}
	entries, err := os.ReadDir(l.Root)
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if err := os.WriteFile(l.InstanceFile(), []byte("../../etc\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if id, err := l.Instance(); err == nil {
		t.Errorf("took %q", id)
	}
}

// TestPathsAreDistinct calls every method that returns a path: two names for one
// file would be two owners of it, and none may leave the directory that it is in.
func TestPathsAreDistinct(t *testing.T) {
	l := Layout{Root: "/s"}
	seen := map[string]string{}
	walk := func(prefix, root string, v reflect.Value) {
		for i := range v.NumMethod() {
			m, name := v.Method(i), prefix+v.Type().Method(i).Name
			if m.Type().NumOut() != 1 || m.Type().Out(0).Kind() != reflect.String {
				continue
			}
			args := make([]reflect.Value, m.Type().NumIn())
			for k := range args {
				args[k] = reflect.ValueOf("x1")
			}
			path := m.Call(args)[0].String()
			if path != root && !strings.HasPrefix(path, root+"/") {
				t.Errorf("%s is %s, outside %s", name, path, root)
			}
			if other, ok := seen[path]; ok {
				t.Errorf("%s and %s are both %s", name, other, path)
			}
			seen[path] = name
		}
	}
	walk("Layout.", "/s", reflect.ValueOf(l))
	walk("VMDir.", "/s/vms/x1", reflect.ValueOf(l.VM("x1")))
	walk("ImageDir.", "/s/images/x1", reflect.ValueOf(l.Image("x1")))
	walk("KernelDir.", "/s/kernels/x1", reflect.ValueOf(l.Kernel("x1")))
	if len(seen) < 30 {
		t.Errorf("only %d paths", len(seen))
	}
}

func TestThisHost(t *testing.T) {
	h, err := ThisHost()
	if err != nil || h.CPUs < 1 || h.Memory < 64<<20 {
		t.Errorf("%+v, %v", h, err)
	}
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Skip("no /proc/meminfo")
	}
	var kib int64
	if _, err := fmt.Sscanf(string(data), "MemTotal: %d kB", &kib); err != nil || kib<<10 != h.Memory {
		t.Errorf("the kernel says %d KiB, ThisHost %d bytes (%v)", kib, h.Memory, err)
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"512M": 512 << 20, "4G": 4 << 30, "4g": 4 << 30, "4GiB": 4 << 30, "4gb": 4 << 30, "4 GiB": 4 << 30,
		"1.5G": 1536 << 20, "0M": 0, "10K": 10 << 10, "2T": 2 << 40, "1P": 1 << 50,
	} {
		if got, err := ParseSize(s); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "4", "1.5", "0", "-4G", "+4G", "G", "4X", "4GG", "4Gi", "0x10M", "1e3M", "4G ", " 4G", "4  G", ".5G", "5.G", "NaNM", "99999P", "4G\n", "1_000M"} {
		if got, err := ParseSize(s); err == nil || api.CodeOf(err) != api.Invalid {
			t.Errorf("ParseSize(%q) = %d, %v", s, got, err)
		}
	}
	if _, err := ParseSize("4096"); !strings.Contains(err.Error(), "lacks a unit") {
		t.Errorf("no word about the unit: %v", err)
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0B", 17: "17B", 1 << 10: "1K", 512 << 20: "512M", 1536 << 20: "1.5G", 1025 << 20: "1025M", 4 << 30: "4G",
		4<<30 + 1: "4G", 20 << 30: "20G", 3700 << 20: "3700M", 64 << 40: "64T", -(4 << 30): "-4G",
		math.MaxInt64: "8E", math.MinInt64: "-8E",
	} {
		if got := FormatSize(n); got != want {
			t.Errorf("FormatSize(%d) = %q, want %q", n, got, want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		// Whole MiB up to 1 TiB, as memory and disks have them, come back exactly.
		n := rapid.Int64Range(1, 1<<20-1).Draw(t, "MiB") << 20
		got, err := ParseSize(FormatSize(n))
		if err != nil || got != n {
			t.Fatalf("%d → %q → %d, %v", n, FormatSize(n), got, err)
		}
	})
}

func TestParseDuration(t *testing.T) {
	for s, want := range map[string]time.Duration{"30s": 30 * time.Second, "10m": 10 * time.Minute, "1h30m": 90 * time.Minute, "0": 0} {
		if got, err := ParseDuration(s); err != nil || got != want {
			t.Errorf("ParseDuration(%q) = %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "30", "-1s", "soon", "1d", "9999999999h"} {
		if got, err := ParseDuration(s); api.CodeOf(err) != api.Invalid {
			t.Errorf("ParseDuration(%q) = %v, %v", s, got, err)
		}
	}
}

func TestValidateCPUs(t *testing.T) {
	for n, ok := range map[int]bool{-1: false, 0: false, 1: true, 255: true, 256: false} {
		if err := ValidateCPUs(n); (err == nil) != ok || err != nil && api.CodeOf(err) != api.Invalid {
			t.Errorf("%d CPUs: %v", n, err)
		}
	}
}

func TestValidateName(t *testing.T) {
	for _, name := range []string{"a", "0", "dev", "my-shop-2", strings.Repeat("x", 63)} {
		if err := ValidateName(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", "-a", "a-", "A", "a_b", "a.b", "a b", "ä", "a\n", "localhost", "../x", strings.Repeat("x", 64)} {
		if err := ValidateName(name); api.CodeOf(err) != api.Invalid {
			t.Errorf("ValidateName(%q) = %v", name, err)
		}
	}
}

func TestNameFrom(t *testing.T) {
	for text, want := range map[string]string{
		"shop": "shop", "My Shop": "my-shop", "my_shop.git": "my-shop-git", "--x--": "x", "…": "vm", "": "vm", "localhost": "vm",
		"Übung 7": "bung-7", "a///b": "a-b", strings.Repeat("x", 62) + "--y": strings.Repeat("x", 62),
	} {
		if got := NameFrom(text); got != want {
			t.Errorf("NameFrom(%q) = %q, want %q", text, got, want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.String().Draw(t, "text")
		n := rapid.IntRange(1, 100000).Draw(t, "n")
		if err := ValidateName(NameFrom(text)); err != nil {
			t.Fatalf("NameFrom(%q): %v", text, err)
		}
		if err := ValidateName(Numbered(NameFrom(text), n)); err != nil {
			t.Fatal(err)
		}
	})
	long := strings.Repeat("x", 63)
	if a, b := Numbered(long, 2), Numbered(long, 3); a == b || a == long || len(a) > 63 {
		t.Errorf("%q, %q", a, b)
	}
	if got := Numbered("shop", 1) + " " + Numbered("shop", 2); got != "shop shop-2" {
		t.Error(got)
	}
}

func TestRandomNames(t *testing.T) {
	for _, list := range []string{adjectives, nouns} {
		words := strings.Fields(list)
		seen := map[string]bool{}
		for _, w := range words {
			if seen[w] || !label.MatchString(w) || len(w) > 12 {
				t.Errorf("word %q", w)
			}
			seen[w] = true
		}
		if len(words) < 60 {
			t.Errorf("only %d words", len(words))
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	a, b := randomName(r.IntN), randomName(r.IntN)
	if a == b || ValidateName(a) != nil || ValidateName(RandomName()) != nil {
		t.Errorf("%q, %q", a, b)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("cpus = 2\nmemory = \"4G\"\n"))
	f.Add([]byte("[a]\nb = {c = 1}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("c.toml", data, testHost)
		if err != nil && api.CodeOf(err) != api.Invalid {
			t.Fatal(err)
		}
		if err == nil && errors.Join(ValidateCPUs(c.CPUs), ValidateMemory(c.Memory), ValidateDisk(c.Disk)) != nil {
			t.Fatalf("accepted %+v", c)
		}
	})
}
