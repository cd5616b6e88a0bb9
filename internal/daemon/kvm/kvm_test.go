package kvm

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestMissing(t *testing.T) {
	good := Facts{Virt: "vmx", Device: true, API: 12}
	for _, c := range []struct {
		name   string
		change func(*Facts)
		why    string
		remedy string
	}{
		{"works", func(*Facts) {}, "", ""},
		{"works on AMD", func(f *Facts) { f.Virt = "svm" }, "", ""},
		{"kvm_pvm beside real KVM", func(f *Facts) { f.PVM = true }, "", ""},
		{"off", func(f *Facts) { f.Off = true }, "configuration", ""},
		{"kvm_pvm that opens and makes VMs", func(f *Facts) { f.Virt, f.PVM = "", true }, "kvm_pvm", ""},
		{"no flag, yet a device", func(f *Facts) { f.Virt = "" }, "not to be trusted", ""},
		{"no flag, no device", func(f *Facts) { f.Virt, f.Device = "", false }, "firmware", ""},
		{"no module", func(f *Facts) { f.Virt, f.Device, f.Open = "svm", false, os.ErrNotExist }, "cannot open", "sudo modprobe kvm_amd"},
		{"denied", func(f *Facts) { f.Open = os.ErrPermission }, "/dev/kvm: permission denied", "sudo usermod -aG kvm $USER"},
		{"another API", func(f *Facts) { f.API = 11 }, "version 11", ""},
		{"no VM", func(f *Facts) { f.CreateVM = errors.New("device busy") }, "makes no VM: device busy", ""},
	} {
		f := good
		c.change(&f)
		if why := f.Missing(); !strings.Contains(why, c.why) || (why == "") != (c.why == "") {
			t.Errorf("%s: %q", c.name, why)
		}
		if remedy := f.Remedy(); remedy != c.remedy {
			t.Errorf("%s: remedy %q, want %q", c.name, remedy, c.remedy)
		}
	}
}

const cpuinfo = `processor	: 0
flags		: fpu vme constant_tsc %s nx

processor	: 1
flags		: fpu vmx
`

func TestCPUInfo(t *testing.T) {
	for flag, want := range map[string]string{"svm": "svm", "vmx": "vmx", "svm_lock": "", "": ""} {
		if got := virtFlag(fmt.Sprintf(cpuinfo, flag)); got != want {
			t.Errorf("flag %q: %q, want %q", flag, got, want)
		}
	}
}
