package dmsnap

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/hostcmd"
)

func TestArgv(t *testing.T) {
	name := "banger-c0ffee-0123456789ab"
	for want, argv := range map[string][]string{
		"dmsetup create --noudevrules --noudevsync --uuid " + name + " " + name: createArgv(name),
		"dmsetup remove --noudevrules --noudevsync " + name:                     removeArgv(name),
		"dmsetup status --noflush " + name:                                      statusArgv(name),
	} {
		if got := strings.Join(argv, " "); got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
}

func TestTable(t *testing.T) {
	h := header{Image: identity{Size: 3*mib + 512}, Size: 8 * mib}
	if got, want := h.table("7:0", "7:1", "7:2"), "0 6145 snapshot 7:0 7:1 PO 8\n6145 10239 linear 7:2 0\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	h.Size = h.Image.Size
	if got, want := h.table("7:0", "7:1", ""), "0 6145 snapshot 7:0 7:1 PO 8\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestDeviceNames(t *testing.T) {
	for vm, want := range map[string]string{
		"0123456789ab": "banger-c0ffee-0123456789ab", "a": "banger-c0ffee-a",
		"": "", "../x": "", "-f": "", "a b": "", strings.Repeat("x", 50): "",
	} {
		if got, err := New("c0ffee").device(vm); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", vm, got, err)
		}
	}
	if _, err := New("").device("a"); err == nil {
		t.Error("an instance without a name")
	}
}

func TestParseStatus(t *testing.T) {
	for text, want := range map[string]Status{
		"0 1048576 snapshot 41264/524288 176\n":            {Used: 41264 * 512, Total: 524288 * 512},
		"0 6145 snapshot 16/8192 16\n6145 10239 linear \n": {Used: 16 * 512, Total: 8192 * 512},
		"0 6145 snapshot Invalid\n6145 10239 linear \n":    {Invalid: true},
		"0 6145 snapshot Overflow\n":                       {Overflow: true},
		"banger-c0ffee-a: 0 1 snapshot 1/2 3":              {},
		"0 1 snapshot Merge failed":                        {},
		"0 1 snapshot -1/2":                                {},
		"0 1 snapshot 99999999999999999999/2":              {},
		"":                                                 {},
		"0 1 linear ":                                      {},
	} {
		got, err := parseStatus(text)
		if got != want || (err == nil) != (want != Status{}) {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, want)
		}
	}
}

func FuzzParseStatus(f *testing.F) {
	f.Add("0 1048576 snapshot 41264/524288 176\n6145 10239 linear \n")
	f.Add("0 6145 snapshot Invalid")
	f.Fuzz(func(t *testing.T, text string) {
		if s, err := parseStatus(text); err == nil && (s.Used < 0 || s.Total < 0 || s.Used > maxSize || s.Total > maxSize) {
			t.Errorf("%q: %+v", text, s)
		}
	})
}

func TestExplain(t *testing.T) {
	cause := errors.New("exit status 1")
	for text, want := range map[string]string{
		"device-mapper: remove ioctl on banger-c0ffee-a  failed: Device or resource busy\nCommand failed.\n": `dmsetup x: "remove ioctl on banger-c0ffee-a  failed": device or resource busy`,
		"/dev/mapper/control: open failed: No such device\nFailure to communicate.\nCommand failed.\n":       `dmsetup x: "/dev/mapper/control: open failed": no such device`,
		"Command failed.\n": "exit status 1",
		"":                  "exit status 1",
	} {
		if got := explain("x", text, cause); got.Error() != want {
			t.Errorf("%q: %v, want %s", text, got, want)
		}
	}
	if err := explain("x", "a: Device or resource busy", cause); !errors.Is(err, unix.EBUSY) {
		t.Errorf("no errno: %v", err)
	}
}

func FuzzExplain(f *testing.F) {
	f.Add("device-mapper: remove ioctl on x failed: Device or resource busy\nCommand failed.\n")
	f.Fuzz(func(t *testing.T, text string) {
		if err := explain("x", text, errors.ErrUnsupported); err == nil {
			t.Error("an error became none")
		}
	})
}

func TestNoDeviceMapper(t *testing.T) {
	_, _, _, path := madeDisk(t, 8*mib)
	d := New("c0ffee")
	mask := func() error {
		if err := cover("/sys/class/misc"); err != nil {
			return err
		}
		if _, err := os.Stat(dmDir); err != nil {
			return nil
		}
		return cover(dmDir)
	}
	for what, f := range map[string]func() error{
		"Attach": func() error { _, err := d.Attach(t.Context(), "a", path); return err },
		"Probe":  func() error { return d.Probe(t.Context(), filepath.Dir(path)) },
	} {
		if err := hostWithout(t, mask, f); err == nil || !strings.Contains(err.Error(), "this kernel has no device-mapper (module dm_mod)") {
			t.Errorf("%s: %v", what, err)
		}
	}
	noLoops(t, "banger-c0ffee-")
	for _, i := range Inventories("c0ffee", filepath.Dir(path)) {
		if objects, err := i.List(t.Context()); err != nil || len(objects) != 0 {
			t.Errorf("%s: %v, %v", i.Kind(), objects, err)
		}
	}
}

func TestNoDmsetup(t *testing.T) {
	mask := func() error {
		path, err := hostcmd.LookPath(Program)
		if err != nil {
			return nil // so it is
		}
		return unix.Mount("/dev/null", path, "", unix.MS_BIND, "")
	}
	err := hostWithout(t, mask, func() error { return New("c0ffee").Probe(t.Context(), t.TempDir()) })
	if !errors.Is(err, exec.ErrNotFound) || !strings.Contains(err.Error(), "dmsetup is not installed") {
		t.Errorf("Probe: %v", err)
	}
}

func TestCancelledDmsetup(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := dmsetup(ctx, statusArgv("x"), ""); err == nil {
		t.Error("it ran")
	}
}
