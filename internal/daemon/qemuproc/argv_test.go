package qemuproc

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"banger/internal/config"
	"banger/internal/daemon/check"
	"banger/internal/daemon/driver"
)

var update = flag.Bool("update", false, "write the golden files")

func exampleSpec() driver.Spec {
	return driver.Spec{
		ID: "0f9a", Name: "shop", CPUs: 2, Memory: 2 << 30,
		Kernel: "run/kernel", Initrd: "run/initrd",
		Disks: []driver.DiskSpec{
			{Serial: "banger-root", Path: "disk", Format: "raw"},
			{Serial: "banger-modules", Path: "run/modules", Format: "raw", ReadOnly: true},
		},
		NIC: &driver.NIC{MAC: "02:ba:6e:01:02:03", Socket: "run/net.sock"},
	}
}

func exampleSetup() setup {
	return setup{Program: "/usr/bin/qemu-system-x86_64", Version: "7.2.22", Accel: "tcg", Sandbox: true,
		Reason: "no kvm", TSC: 2596130}
}

// text puts an option and its value on one line.
func text(args []string) string {
	var b strings.Builder
	for i, arg := range args {
		switch {
		case i == 0:
		case strings.HasPrefix(arg, "-"):
			b.WriteString("\n")
		default:
			b.WriteString(" ")
		}
		b.WriteString(arg)
	}
	return b.String() + "\n"
}

func TestGoldenArgv(t *testing.T) {
	kvm := exampleSetup()
	kvm.Accel, kvm.Reason, kvm.TSC = "kvm", "", 0
	plain := exampleSetup()
	plain.Sandbox = false
	odd := exampleSpec()
	odd.Name = "a,b"
	odd.Disks = []driver.DiskSpec{{Serial: "s,1", Path: "di,sk", Format: "qcow2"}}
	odd.NIC.Socket = "run/n,et.sock"
	alone := exampleSpec()
	alone.NIC = nil
	for name, c := range map[string]struct {
		spec  driver.Spec
		setup setup
	}{
		"no-nic":     {alone, exampleSetup()},
		"tcg":        {exampleSpec(), exampleSetup()},
		"kvm":        {exampleSpec(), kvm},
		"no-seccomp": {exampleSpec(), plain},
		"commas":     {odd, exampleSetup()},
	} {
		t.Run(name, func(t *testing.T) {
			args, err := argv(c.spec, c.setup)
			if err != nil {
				t.Fatal(err)
			}
			got, file := text(args), filepath.Join("testdata", name+".argv")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("argv differs from %s (go test -update writes it):\n%s", file, got)
			}
		})
	}
}

func TestSpecsThatAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*driver.Spec)
		want   string
	}{
		"no cpu":            {func(s *driver.Spec) { s.CPUs = 0 }, "0 cpus"},
		"too many cpus":     {func(s *driver.Spec) { s.CPUs = 256 }, "takes 255"},
		"little memory":     {func(s *driver.Spec) { s.Memory = 127 << 20 }, "128 MiB"},
		"odd memory":        {func(s *driver.Spec) { s.Memory += 4096 }, "multiple of 1 MiB"},
		"no name":           {func(s *driver.Spec) { s.Name = "" }, "no name"},
		"no kernel":         {func(s *driver.Spec) { s.Kernel = "" }, "its kernel"},
		"absolute kernel":   {func(s *driver.Spec) { s.Kernel = "/boot/vmlinuz" }, "its kernel"},
		"initrd above":      {func(s *driver.Spec) { s.Initrd = "run/../../initrd" }, "its initramfs"},
		"initrd an option":  {func(s *driver.Spec) { s.Initrd = "-initrd" }, "its initramfs"},
		"disk above":        {func(s *driver.Spec) { s.Disks[0].Path = "../disk" }, "below the VM's directory"},
		"unknown format":    {func(s *driver.Spec) { s.Disks[0].Format = "" }, "format"},
		"no serial":         {func(s *driver.Spec) { s.Disks[0].Serial = "" }, "1 to 20 bytes"},
		"serial of 21":      {func(s *driver.Spec) { s.Disks[0].Serial = strings.Repeat("s", 21) }, "1 to 20 bytes"},
		"one serial twice":  {func(s *driver.Spec) { s.Disks[1].Serial = s.Disks[0].Serial }, "two of it"},
		"no mac":            {func(s *driver.Spec) { s.NIC.MAC = "" }, "network card"},
		"multicast mac":     {func(s *driver.Spec) { s.NIC.MAC = "03:ba:6e:00:00:02" }, "network card"},
		"zero mac":          {func(s *driver.Spec) { s.NIC.MAC = "00:00:00:00:00:00" }, "network card"},
		"mac of 8 bytes":    {func(s *driver.Spec) { s.NIC.MAC = "02:00:00:00:00:00:00:01" }, "network card"},
		"mac with options":  {func(s *driver.Spec) { s.NIC.MAC += ",mq=on" }, "network card"},
		"no net socket":     {func(s *driver.Spec) { s.NIC.Socket = "" }, "network card"},
		"net socket above":  {func(s *driver.Spec) { s.NIC.Socket = "../net.sock" }, "below the VM's directory"},
		"more than 5 disks": {func(s *driver.Spec) { s.Disks = make([]driver.DiskSpec, 6) }, "6 disks"},
	} {
		t.Run(name, func(t *testing.T) {
			spec := exampleSpec()
			c.change(&spec)
			args, err := argv(spec, exampleSetup())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("argv %v, error %v; want one with %q", args, err, c.want)
			}
		})
	}
}

func TestCommandComesAfterProbe(t *testing.T) {
	if _, err := New(config.KVMAuto).Command(exampleSpec()); !errors.Is(err, errNotProbed) {
		t.Errorf("error %v", err)
	}
}

const cpuinfo = `processor	: 0
flags		: fpu vme constant_tsc %s nx
bogomips	: 5192.26

processor	: 1
flags		: fpu vmx
bogomips	: 1.00
`

func TestCPUInfo(t *testing.T) {
	if got := bogomipsKHz(cpuinfo); got != 2596130 {
		t.Errorf("bogomips: %d kHz", got)
	}
	for _, bad := range []string{"", "bogomips : 5192.26\n", "flags : constant_tsc\nbogomips : many\n"} {
		if got := bogomipsKHz(bad); got != 0 {
			t.Errorf("%q: %d kHz, want 0", bad, got)
		}
	}
}

func TestChooseTSC(t *testing.T) {
	for _, c := range []struct {
		bogomips, measured, want int64
	}{
		{2596130, 2596900, 2596130},
		{5192260, 2596900, 2596900}, // twice the rate: the guest would live at half speed
		{2596130, 0, 2596130},
		{0, 2596900, 2596900},
	} {
		if got, err := chooseTSC(c.bogomips, c.measured); err != nil || got != c.want {
			t.Errorf("%d and %d: %v, %v", c.bogomips, c.measured, got, err)
		}
	}
	if _, err := chooseTSC(0, 0); err == nil {
		t.Error("no source, no error")
	}
}

// On a machine with a constant TSC the two sources agree, or one of them is broken.
func TestSourcesOfTSCAgree(t *testing.T) {
	got, err := hostTSC()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	if want := bogomipsKHz(string(data)); want != 0 && got != want {
		t.Errorf("measured %d kHz, bogomips say %d kHz", got, want)
	}
}

func TestVersionsCompare(t *testing.T) {
	for version, want := range map[string]bool{
		"6.2.0": false, "7.1.94": false, "7.2": true, "7.2.0": true, "7.2.22": true, "7.10": true, "8.0": true, "10.0.2": true,
		"2.11": false, "": false, "7": false,
	} {
		if got := atLeast(version, streamMajor, streamMinor); got != want {
			t.Errorf("%q: %v", version, got)
		}
	}
}

// A QEMU that is too old for the network runs VMs without one, and says why.
func TestOldQEMU(t *testing.T) {
	program := filepath.Join(t.TempDir(), "qemu")
	script := "#!/bin/sh\ncase \"$*\" in\n*version*) echo 'QEMU emulator version 6.2.0 (Debian 1:6.2+dfsg-2ubuntu6)' ;;\n" +
		"*) echo 'microvm              microvm (i386)' ;;\nesac\n"
	if err := os.WriteFile(program, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv(ProgramEnv, program)
	v := New(config.KVMOff)
	a, err := v.Probe(t.Context())
	if err != nil || a.Network || !strings.Contains(a.NoNetwork, "QEMU 6.2.0") || !strings.Contains(a.NoNetwork, "needs 7.2 or newer") {
		t.Errorf("%+v, %v", a, err)
	}
	spec := exampleSpec()
	if c, err := v.Command(spec); err == nil || !strings.Contains(err.Error(), a.NoNetwork) {
		t.Errorf("with a card: %v, %v", c.Argv, err)
	}
	spec.NIC = nil
	if _, err := v.Command(spec); err != nil {
		t.Errorf("without a card: %v", err)
	}
	found := Checks(config.KVMOff)[0].Probe(t.Context())
	if found.Result != check.Warn || !strings.Contains(found.Text, "VMs have no network") || !strings.Contains(found.Text, "has no -netdev stream") ||
		!strings.Contains(found.Fix, ProgramEnv) {
		t.Errorf("doctor finds %+v", found)
	}
}

func TestVersion(t *testing.T) {
	for out, want := range map[string]string{
		"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright …\n": "7.2.22",
		"QEMU emulator version 10.0.2\n":                             "10.0.2",
		"warning: something\nQEMU emulator version 8.2.2 (Debian)\n": "8.2.2",
		"bash 5.2": "",
		"":         "",
	} {
		got, err := parseVersion(out)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("%q: %q, %v", out, got, err)
		}
	}
	machines := "Supported machines are:\nmicrovm-ng           x\nmicrovm              microvm (i386)\n"
	if !hasMachine(machines, "microvm") || hasMachine(machines, "pc") || hasMachine(machines[:40], "microvm") {
		t.Error("the table of machines is misread")
	}
}
