// Package kvm finds out whether this host's KVM runs a stock kernel. That /dev/kvm opens
// and makes a VM is not enough: under a software KVM (kvm_pvm) both work, a few
// instructions even run, and a stock kernel hangs in its boot stub. Such a host shows
// neither vmx nor svm.
package kvm

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Facts is what there is to know of KVM.
type Facts struct {
	Off      bool   // the configuration says so
	Virt     string // "vmx" or "svm" of /proc/cpuinfo, or empty
	PVM      bool   // the module kvm_pvm is there
	Device   bool   // /dev/kvm exists
	Open     error  // opening /dev/kvm for reading and writing
	API      int    // of KVM_GET_API_VERSION
	CreateVM error  // of KVM_CREATE_VM
}

const (
	// Device is where the kernel offers KVM.
	Device = "/dev/kvm"
	// See linux/kvm.h: _IO(KVMIO, 0x00) and _IO(KVMIO, 0x01), and KVM_API_VERSION.
	getAPIVersion = 0xae00
	createVM      = 0xae01
	apiVersion    = 12
)

// Missing says in words why KVM does not work; empty when it does.
func (f Facts) Missing() string {
	switch {
	case f.Off:
		return "kvm is off in the configuration"
	case f.Virt == "" && f.PVM:
		return "the CPU shows neither vmx nor svm; " + Device + " is kvm_pvm, which runs no stock kernel"
	case f.Virt == "" && f.Device:
		return "the CPU shows neither vmx nor svm, so " + Device + " is not to be trusted"
	case f.Virt == "":
		return "the CPU shows neither vmx nor svm: virtualisation is missing or off in the firmware"
	case f.Open != nil:
		return fmt.Sprintf("cannot open %s: %v", Device, f.Open)
	case f.API != apiVersion:
		return fmt.Sprintf("%s speaks API version %d, not %d", Device, f.API, apiVersion)
	case f.CreateVM != nil:
		return fmt.Sprintf("%s makes no VM: %v", Device, f.CreateVM)
	}
	return ""
}

// Remedy is a command that may help where KVM does not work, or empty.
func (f Facts) Remedy() string {
	switch {
	case f.Off || f.Virt == "":
		return ""
	case !f.Device:
		return "sudo modprobe kvm_" + map[string]string{"vmx": "intel", "svm": "amd"}[f.Virt]
	case f.Open != nil:
		return "sudo usermod -aG kvm $USER"
	}
	return ""
}

// Look asks the kernel. With off it opens nothing.
func Look(off bool) Facts {
	f := Facts{Off: off}
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		f.Virt = virtFlag(string(data))
	}
	_, err := os.Stat("/sys/module/kvm_pvm")
	f.PVM = err == nil
	_, err = os.Stat(Device)
	f.Device = err == nil
	if !off {
		f.ask()
	}
	return f
}

// ask opens KVM and makes an empty VM, which goes away with its descriptor.
func (f *Facts) ask() {
	fd, err := unix.Open(Device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		f.Open = err
		return
	}
	defer unix.Close(fd)
	if f.API, err = unix.IoctlRetInt(fd, getAPIVersion); err != nil {
		f.Open = err
		return
	}
	vm, err := unix.IoctlRetInt(fd, createVM)
	if err != nil {
		f.CreateVM = err
		return
	}
	unix.Close(vm)
}

// virtFlag finds "vmx" or "svm" among the flags of the first processor.
func virtFlag(cpuinfo string) string {
	for _, flag := range strings.Fields(CPUField(cpuinfo, "flags")) {
		if flag == "vmx" || flag == "svm" {
			return flag
		}
	}
	return ""
}

// CPUField is the value of the first line with this key in the text of /proc/cpuinfo.
func CPUField(cpuinfo, key string) string {
	for line := range strings.Lines(cpuinfo) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
