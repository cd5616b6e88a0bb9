package fcproc

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"banger/internal/daemon/driver"
)

const (
	mib = 1 << 20
	// minMemory is what a Debian kernel with its initramfs still boots in, in bytes.
	minMemory = 128 * mib
	// maxCPUs is Firecracker's own bound, see MachineConfiguration in its API.
	maxCPUs = 32
	// openFiles bounds the VMM's descriptors; the channel's connections take one each.
	openFiles = 2048
	// guestCID is the guest's address in its own world; two VMs may have the same,
	// because the host's side is a Unix socket.
	guestCID = 3
)

// The sockets, below the VM's directory as the jail repeats it.
const (
	apiSocket   = "run/api.sock"
	vsockSocket = "run/v.sock"
)

// vmID is what the jailer takes as an id.
var vmID = regexp.MustCompile(`^[0-9A-Za-z-]{1,64}$`)

func validate(spec driver.Spec) error {
	switch {
	case spec.CPUs > maxCPUs:
		return fmt.Errorf("%d cpus: the machine takes %d", spec.CPUs, maxCPUs)
	case spec.Memory < minMemory:
		return fmt.Errorf("%d bytes of memory: the least is %d MiB", spec.Memory, minMemory/mib)
	case !vmID.MatchString(spec.ID):
		return fmt.Errorf("the jailer takes no id like %q", spec.ID)
	case spec.UID <= 0 || spec.GID <= 0:
		return errors.New("its jail has no uid and gid of its own")
	case spec.NIC != nil:
		return errors.New("it has a network card, for which nothing carries the frames")
	}
	for _, d := range spec.Disks {
		if d.Format != "raw" {
			return fmt.Errorf("disk %q has the format %s: Firecracker reads raw ones", d.Serial, d.Format)
		}
	}
	return spec.Validate()
}

// argv is the jailer's command line: a pure function.
func argv(spec driver.Spec, s setup) []string {
	return []string{
		s.Jailer,
		"--id", spec.ID,
		"--exec-file", s.Firecracker,
		"--uid", strconv.Itoa(spec.UID),
		"--gid", strconv.Itoa(spec.GID),
		"--chroot-base-dir", jailBase,
		"--cgroup-version", "2", // it is in its group already: the default, 1, looks for mounts
		"--resource-limit", "no-file=" + strconv.Itoa(openFiles),
		"--",
		"--api-sock", apiSocket,
		"--level", "Error",
	}
}

// call is one request of the API.
type call struct {
	Method string `json:"method"`
	Path   string `json:"path"`
	Body   any    `json:"body"`
}

// The bodies, see src/firecracker/swagger/firecracker.yaml in Firecracker's source. It
// refuses fields that it does not know, so only those are here that 1.12 has.
type (
	machineConfig struct {
		CPUs   int   `json:"vcpu_count"`
		Memory int64 `json:"mem_size_mib"`
	}
	bootSource struct {
		Kernel string `json:"kernel_image_path"`
		Initrd string `json:"initrd_path"`
		Args   string `json:"boot_args"`
	}
	drive struct {
		ID       string `json:"drive_id"`
		Path     string `json:"path_on_host"`
		Root     bool   `json:"is_root_device"`
		ReadOnly bool   `json:"is_read_only"`
		// Writeback honours the guest's flushes. The default, Unsafe, loses what the
		// guest has synced when the host loses power.
		Cache string `json:"cache_type"`
	}
	vsock struct {
		CID  int    `json:"guest_cid"`
		Path string `json:"uds_path"`
	}
	entropy struct{}
	action  struct {
		Type string `json:"action_type"`
	}
)

// calls are the API's requests that configure and start the guest, in order: a pure
// function. The guest finds its disks in the order of spec.Disks: vda, vdb.
func calls(spec driver.Spec) []call {
	list := []call{
		{"PUT", "/machine-config", machineConfig{spec.CPUs, spec.Memory / mib}},
		{"PUT", "/boot-source", bootSource{spec.Kernel, spec.Initrd, kernelArgs()}},
	}
	for _, d := range spec.Disks {
		id := strings.ReplaceAll(d.Serial, "-", "_") // letters, digits and '_'
		list = append(list, call{"PUT", "/drives/" + id, drive{ID: id, Path: d.Path, ReadOnly: d.ReadOnly, Cache: "Writeback"}})
	}
	return append(list,
		call{"PUT", "/entropy", entropy{}},
		call{"PUT", "/vsock", vsock{guestCID, vsockSocket}},
		call{"PUT", "/actions", action{"InstanceStart"}},
	)
}

// kernelArgs is what the machine needs of the kernel's command line.
func kernelArgs() string {
	return strings.Join([]string{
		"console=ttyS0",
		// Only what is fatal: each byte of the console is an exit of the VM. A panic
		// raises the level by itself.
		"quiet", "loglevel=1",
		// A panic ends the VM, which is seen, instead of hanging, which is not.
		"panic=-1",
		// A restart through the keyboard controller is the one end that Firecracker sees.
		"reboot=k",
		// It has the controller for that and for SendCtrlAltDel, and nothing behind it.
		"i8042.noaux", "i8042.nomux", "i8042.dumbkbd",
		// Self tests of the crypto code.
		"cryptomgr.notests",
		"random.trust_cpu=on",
	}, " ")
}
