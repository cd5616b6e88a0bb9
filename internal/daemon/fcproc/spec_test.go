package fcproc

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"banger/internal/daemon/driver"
)

func exampleSpec() driver.Spec {
	return driver.Spec{
		ID: "0f9a", Name: "shop", CPUs: 2, Memory: 2 << 30, UID: 1879048193, GID: 1879048193,
		Kernel: "run/kernel", Initrd: "run/initrd",
		Disks: []driver.DiskSpec{
			{Serial: "banger-root", Path: "disk", Device: "/dev/dm-0", Format: "raw"},
			{Serial: "banger-modules", Path: "run/modules", Format: "raw", ReadOnly: true},
		},
	}
}

// What Firecracker and its jailer are told is what the golden files hold.
func TestGolden(t *testing.T) {
	s := setup{Firecracker: "/opt/firecracker", Jailer: "/opt/jailer", Version: Tested}
	var b strings.Builder
	for _, arg := range argv(exampleSpec(), s) {
		b.WriteString(arg + "\n")
	}
	for _, c := range calls(exampleSpec()) {
		body, err := json.Marshal(c.Body)
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString(c.Method + " " + c.Path + " " + string(body) + "\n")
	}
	file := filepath.Join("testdata", "example.txt")
	if os.Getenv("BANGER_UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

func TestRefused(t *testing.T) {
	for name, change := range map[string]func(*driver.Spec){
		"33 cpus":          func(s *driver.Spec) { s.CPUs = 33 },
		"little memory":    func(s *driver.Spec) { s.Memory = 64 << 20 },
		"an id with a dot": func(s *driver.Spec) { s.ID = "a.b" },
		"root's uid":       func(s *driver.Spec) { s.UID = 0 },
		"root's gid":       func(s *driver.Spec) { s.GID = 0 },
		"a card":           func(s *driver.Spec) { s.NIC = &driver.NIC{MAC: "02:ba:6e:01:02:03", Socket: "run/net.sock"} },
		"qcow2":            func(s *driver.Spec) { s.Disks[0].Format = "qcow2" },
		"a long id":        func(s *driver.Spec) { s.ID = strings.Repeat("a", 65) },
	} {
		spec := exampleSpec()
		change(&spec)
		if err := validate(spec); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if err := validate(exampleSpec()); err != nil {
		t.Error(err)
	}
	if _, err := New().Command(exampleSpec()); !errors.Is(err, errNotProbed) {
		t.Errorf("before Probe: %v", err)
	}
}

func TestEnding(t *testing.T) {
	v := New()
	for code, want := range map[int]string{-1: "", 0: "reset the machine", 148: "filter forbids", 153: "another version", 77: ""} {
		if got := v.Ending(code); !strings.Contains(got, want) || (got == "") != (want == "") {
			t.Errorf("%d: %q", code, got)
		}
	}
}
