// Package driver holds the contracts between the VM manager and the host: what a
// virtual machine monitor, a root disk, a guest channel and an inventory of host
// objects must do. It holds no code but the check of a Spec. Package fake has a stateful fake of each,
// and the conformance suites in package conformance run on fakes and real
// drivers alike.
//
// Drivers return wrapped errno values and never log. Release-like calls (Detach,
// Remove) take "absent" as success, so that one path serves stop, rollback,
// delete and crash recovery.
package driver

import (
	"context"
	"net"
)

// Host is what daemon.Open found on this machine and wired.
type Host struct {
	VMM VMM
	// Disk makes new disks. A VM stays with the driver that made its disk: OtherDisks
	// are those that an earlier probe may have chosen.
	Disk        Disk
	OtherDisks  []Disk
	Inventories []Inventory
	// Groups is nil where VMs are not jailed: in user mode.
	Groups Groups
}

// Groups puts each VM into control groups of its own: one leaf for its shim, a sibling
// for its VMM, which outlive the daemon. What is in them is gone when they are empty,
// not before.
type Groups interface {
	// Group is the path of the VMM's leaf, a pure function.
	Group(vm string) string
	// Place makes the groups around the shim, whose pid is the host's.
	Place(ctx context.Context, vm string, pid int, l Limits) error
	// Remove ends what is in the groups and removes them. Absent is success.
	Remove(ctx context.Context, vm string) error
}

// Limits are what a VMM may use beside the guest's own bounds.
type Limits struct {
	Memory int64 // bytes, the guest's; the driver adds what the VMM needs
	CPUs   int
}

// VMM knows one virtual machine monitor. It starts no process: the shim does, by
// the Command that the VMM makes. dir is always the VM's directory, which is the
// VMM's working directory.
type VMM interface {
	// Name is "qemu", "firecracker" or "fake".
	Name() string
	// Probe asks whether the VMM can work here. The error says what is missing.
	Probe(ctx context.Context) (Ability, error)
	// Confine makes what the process of this boot finds around it: a jail. It is undone
	// by Free, also after an error or a crash.
	Confine(ctx context.Context, dir string, spec Spec) error
	// Free removes what Confine made and the VMM left. The process has ended.
	Free(ctx context.Context, dir string) error
	// Command is a pure function of spec and of what Probe found.
	Command(spec Spec) (Command, error)
	// Boot returns when the process that was just started executes its guest. spec is
	// that of Command.
	Boot(ctx context.Context, dir string, spec Spec) error
	// Ending says in words what an exit code of the process means, empty for no more than
	// the number does.
	Ending(code int) string
	// PowerButton asks the guest through the VMM to shut down; errors.ErrUnsupported
	// when the VMM has no such thing.
	PowerButton(ctx context.Context, dir string) error
	// Channel reaches the agent of a running guest. It does no I/O.
	Channel(dir string, magic []byte) Channel
}

// Ability is what a VMM can do on this host.
type Ability struct {
	Accelerator string // "kvm" or "tcg"
	Reason      string // why it is not kvm, in words
	Network     bool   // a Spec may have a NIC
	NoNetwork   string // why not, in words, where something could be done about it
	// Vsock: the agent is reached over the guest's vsock, not over a serial port.
	Vsock bool
	// NoSerials: the guest knows its disks by their order alone.
	NoSerials bool
	// MaxCPUs is what the VMM gives a guest at most, whatever the host has; 0 for no bound.
	MaxCPUs int
}

// Spec describes one boot. All paths are relative to the VM's directory.
type Spec struct {
	ID     string
	Name   string
	CPUs   int
	Memory int64 // bytes, a multiple of 1 MiB
	Kernel string
	Initrd string
	Disks  []DiskSpec
	NIC    *NIC // nil for a VM without a network card
	// UID and GID are who the VMM runs as where it is jailed; 0 elsewhere.
	UID, GID int
}

// NIC is one virtio network card. The VMM listens on Socket, a Unix stream socket, for
// who carries the frames: each has its length before it, 4 bytes, big endian. That one
// may go and another come; the guest's card keeps its carrier.
type NIC struct {
	MAC    string
	Socket string
}

// DiskSpec is one virtio disk.
type DiskSpec struct {
	Serial   string // at most 20 bytes; how the guest finds it
	Path     string
	Device   string // an absolute path of a block device that stands for the file at Path, or empty
	Format   string // "raw" or "qcow2"
	ReadOnly bool
}

// Command is a process to start: Argv[0] is a path or is looked up in PATH.
type Command struct {
	Argv []string
	Env  []string // complete; nothing is inherited
}

// Disk makes root disks. path is absolute.
type Disk interface {
	// Name is "reflink", "qcow2", "copy" or "dm-snapshot".
	Name() string
	// Create makes the disk at path from the image base, size bytes long for the
	// guest, and syncs it; after an error or a crash Remove undoes it.
	Create(ctx context.Context, base, path string, size int64) error
	// Attach makes the disk ready for a VMM and returns how to open it. It is
	// undone by Detach and dies with the host's boot.
	Attach(ctx context.Context, vm, path string) (Attached, error)
	Detach(ctx context.Context, vm, path string, a Attached) error
	// Remove deletes the disk and its data.
	Remove(ctx context.Context, path string) error
}

// Attached is how a VMM opens a disk, and what was made on the host for it.
type Attached struct {
	Path   string `json:"path"`   // relative to the VM's directory; absolute: a block device
	Format string `json:"format"` // "raw" or "qcow2"
	// Device names the host object that was made, empty for none.
	Device string `json:"device,omitempty"`
}

// Channel dials the guest's agent. A Dial while the guest is not up yet waits
// until it is or ctx ends.
type Channel interface {
	Dial(ctx context.Context) (net.Conn, error)
	// Close ends all connections; the guest goes on.
	Close() error
}

// Inventory lists one kind of host object that bears this instance's mark.
type Inventory interface {
	Kind() string // "dm", "loop", …
	List(ctx context.Context) ([]Object, error)
	// Remove takes "absent" as success.
	Remove(ctx context.Context, o Object) error
}

// Object is one thing on the host.
type Object struct {
	Kind string
	Name string
	VM   string // the id of the VM that it was made for
}
