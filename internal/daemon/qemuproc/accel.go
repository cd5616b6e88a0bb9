package qemuproc

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"banger/internal/config"
)

// kvmFacts is what there is to know of KVM.
type kvmFacts struct {
	Off      bool   // the configuration says so
	Virt     string // "vmx" or "svm" of /proc/cpuinfo, or empty
	PVM      bool   // the module kvm_pvm is there
	Device   bool   // /dev/kvm exists
	Open     error  // opening /dev/kvm for reading and writing
	API      int    // of KVM_GET_API_VERSION
	CreateVM error  // of KVM_CREATE_VM
}

const (
	kvmDevice = "/dev/kvm"
	// See linux/kvm.h: _IO(KVMIO, 0x00) and _IO(KVMIO, 0x01), and KVM_API_VERSION.
	kvmGetAPIVersion = 0xae00
	kvmCreateVM      = 0xae01
	kvmAPIVersion    = 12
)

// accelerator decides between "kvm" and "tcg", and says why it is not kvm. That
// /dev/kvm opens and makes a VM is not enough: under a software KVM (kvm_pvm) both
// work, a few instructions even run, and a stock kernel hangs in its boot stub. Such a
// host shows neither vmx nor svm.
func accelerator(f kvmFacts) (accel, reason string) {
	switch {
	case f.Off:
		reason = "kvm is off in the configuration"
	case f.Virt == "" && f.PVM:
		reason = "the CPU shows neither vmx nor svm; " + kvmDevice + " is kvm_pvm, which runs no stock kernel"
	case f.Virt == "" && f.Device:
		reason = "the CPU shows neither vmx nor svm, so " + kvmDevice + " is not to be trusted"
	case f.Virt == "":
		reason = "the CPU shows neither vmx nor svm: virtualisation is missing or off in the firmware"
	case f.Open != nil:
		reason = fmt.Sprintf("cannot open %s: %v", kvmDevice, f.Open)
	case f.API != kvmAPIVersion:
		reason = fmt.Sprintf("%s speaks API version %d, not %d", kvmDevice, f.API, kvmAPIVersion)
	case f.CreateVM != nil:
		reason = fmt.Sprintf("%s makes no VM: %v", kvmDevice, f.CreateVM)
	default:
		return "kvm", ""
	}
	return "tcg", reason
}

func gatherKVM(kvm config.KVM) kvmFacts {
	f := kvmFacts{Off: kvm == config.KVMOff}
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		f.Virt = virtFlag(string(data))
	}
	_, err := os.Stat("/sys/module/kvm_pvm")
	f.PVM = err == nil
	_, err = os.Stat(kvmDevice)
	f.Device = err == nil
	if !f.Off {
		f.ask()
	}
	return f
}

// ask opens KVM and makes an empty VM, which goes away with its descriptor.
func (f *kvmFacts) ask() {
	fd, err := unix.Open(kvmDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		f.Open = err
		return
	}
	defer unix.Close(fd)
	if f.API, err = unix.IoctlRetInt(fd, kvmGetAPIVersion); err != nil {
		f.Open = err
		return
	}
	vm, err := unix.IoctlRetInt(fd, kvmCreateVM)
	if err != nil {
		f.CreateVM = err
		return
	}
	unix.Close(vm)
}

// virtFlag finds "vmx" or "svm" among the flags of the first processor.
func virtFlag(cpuinfo string) string {
	for _, flag := range strings.Fields(cpuField(cpuinfo, "flags")) {
		if flag == "vmx" || flag == "svm" {
			return flag
		}
	}
	return ""
}

// cpuField is the value of the first line with this key in /proc/cpuinfo.
func cpuField(cpuinfo, key string) string {
	for line := range strings.Lines(cpuinfo) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
