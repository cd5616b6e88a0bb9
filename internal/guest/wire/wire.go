// Package wire is what the host and banger-guest share: the configuration that a
// boot carries, and the protocol that the agent speaks.
//
// A connection to the agent is one byte stream (a yamux stream over
// virtio-serial, or a vsock connection). Each stream carries one request: the
// host sends a Request frame, then both sides send frames until the guest has
// sent Reply, Exit or Error, which ends the stream. Frames are
//
//	kind (1 byte)  length (4 bytes, big endian)  payload (length bytes, at most MaxPayload)
//
// and the same frames go from the CLI to the daemon, which decodes and bounds
// each of them on the way.
//
// A daemon speaks to the agents of all earlier releases that may still run:
// fields and operations are only ever added.
package wire

// The range of protocol versions that this release speaks. Hello carries it.
const (
	ProtocolMin = 1
	ProtocolMax = 1
)

const (
	// StdinWindow bounds the bytes of stdin that a host has sent and the guest has
	// not acknowledged, see Request.Acks.
	StdinWindow = 512 << 10
	// PortName is the name of the virtio-serial port of the agent.
	PortName = "banger.agent"
	// VsockPort is where the agent listens in a guest whose channel is vsock. Ports below
	// 1024 are for root alone (vsock(7)), so nobody else in the guest can sit there.
	VsockPort = 1021
	// ConfigPath is where the cpio appended to the initramfs puts Config, as JSON.
	ConfigPath = "/banger/config.json"
	// ModulesDir is where the initramfs keeps the modules that Config.Modules names.
	ModulesDir = "/banger/modules"
	// MaxPayload bounds the payload of one frame, in bytes.
	MaxPayload = 64 << 10
	// MagicLen and NonceLen are the lengths in bytes of the two halves of the
	// channel's preamble.
	MagicLen = 16
	NonceLen = 16
	// IntentPrefix begins the last line that the guest writes to its console; the
	// intent follows: "poweroff", "reboot", "halt", or "failed" when init could not boot. The shim copies it into
	// exit.json.
	IntentPrefix = "banger-intent: "
)

// Config is what one boot of a guest is told. It travels as JSON in a cpio
// archive appended to the initramfs.
type Config struct {
	Version  int      `json:"version"` // 1
	Magic    []byte   `json:"magic"`   // MagicLen random bytes of this boot
	Identity Identity `json:"identity"`
	User     *User    `json:"user,omitempty"` // nil leaves the image's accounts alone
	// Modules are file names below ModulesDir, in the order of loading.
	Modules []string `json:"modules"`
	Root    Root     `json:"root"`
	// KernelModules is the serial of a disk that is mounted read-only on
	// /lib/modules/RELEASE, empty for none.
	KernelModules string `json:"kernel_modules,omitempty"`
	// Network is nil for a guest with its loopback only.
	Network *Network `json:"network,omitempty"`
	// Vsock: the agent listens on VsockPort and takes connections of the host alone, one
	// for each stream. Otherwise it serves the virtio-serial port PortName.
	Vsock bool `json:"vsock,omitempty"`
	// DiskOrder are the serials of the disks in the order of their attachment, vda first,
	// where the VMM gives the disks no serials that the guest can read.
	DiskOrder []string `json:"disk_order,omitempty"`
	// WallClock is the host's time at the start of the boot, nanoseconds since 1970.
	WallClock int64 `json:"wall_clock"`
}

// Identity is who the guest is.
type Identity struct {
	ID        string `json:"id"`         // of the VM, also the answer to "who are you"
	Hostname  string `json:"hostname"`   // a DNS label
	MachineID string `json:"machine_id"` // 32 lower-case hex digits, see machine-id(5)
}

// User is the account that init makes, by the rule in package boot.
type User struct {
	Name string `json:"name"`
	UID  int    `json:"uid"`
	GID  int    `json:"gid"`
}

// Root is the root disk.
type Root struct {
	Serial string `json:"serial"` // of the virtio disk
	FSType string `json:"fstype"` // "ext4"
}

// The operations of the agent.
const (
	OpHello    = "hello"    // Reply: Hello
	OpReady    = "ready"    // waits for the system; Reply: Ready
	OpExec     = "exec"     // Started, then Stdout, Stderr, last Exit
	OpUntar    = "untar"    // the host sends Stdin (a tar), StdinEOF; last Exit
	OpTar      = "tar"      // Stdout (a tar), last Exit
	OpShutdown = "shutdown" // Reply at once, then the guest goes down
	OpClock    = "clock"    // sets the wall clock; Reply
	OpDial     = "dial"     // Started, then bytes both ways, last Exit: see Dial
	OpPorts    = "ports"    // Reply: Ports
)

// Request is the payload of the first frame of a stream, as JSON.
type Request struct {
	Op       string    `json:"op"`
	Nonce    string    `json:"nonce,omitempty"` // hello: echoed in the reply
	Exec     *Exec     `json:"exec,omitempty"`
	Tree     *Tree     `json:"tree,omitempty"`
	Shutdown *Shutdown `json:"shutdown,omitempty"`
	Clock    *Clock    `json:"clock,omitempty"`
	Dial     *Dial     `json:"dial,omitempty"`
	// Acks asks for KindStdinAck frames. The host then never has more than
	// StdinWindow bytes of stdin under way that were not acknowledged (a guest ends a
	// stream that exceeds it), and so the guest can always read on: a signal, or the
	// end of the stream, is seen behind input that the command does not take. Without
	// it they wait behind that input.
	Acks bool `json:"acks,omitempty"`
}

// Exec runs one command. It ends when the command has ended and its output is
// through; when the stream breaks first, the command's process group gets
// SIGHUP, and SIGKILL after 5 s.
type Exec struct {
	Argv []string `json:"argv"`           // empty: the user's login shell, as a login shell
	Env  []string `json:"env,omitempty"`  // KEY=VALUE, over the user's login environment
	Dir  string   `json:"dir,omitempty"`  // empty: the home directory
	User string   `json:"user,omitempty"` // name, uid, or uid:gid; empty: the configured user, else root
	TTY  bool     `json:"tty,omitempty"`
	Rows uint16   `json:"rows,omitempty"`
	Cols uint16   `json:"cols,omitempty"`
	// Stdin false gives the command /dev/null.
	Stdin bool `json:"stdin,omitempty"`
	// Finish leaves out the SIGHUP when the stream breaks: the command takes less than
	// the 5 s, and would leave something half done.
	Finish bool `json:"finish,omitempty"`
}

// Tree names a directory for OpTar and OpUntar.
type Tree struct {
	Dir  string `json:"dir"`            // absolute; untar makes it
	User string `json:"user,omitempty"` // as Exec.User: whose rights are used, who owns what is made
	// Paths limits tar to these paths below Dir, each as it is: no wild cards.
	Paths []string `json:"paths,omitempty"`
	// KeepOwners keeps the owners of the archive (root only).
	KeepOwners bool `json:"keep_owners,omitempty"`
}

// Shutdown asks the guest to go down.
type Shutdown struct {
	Verb string `json:"verb"` // "poweroff" or "reboot"
}

// Clock carries nanoseconds since 1970.
type Clock struct {
	UnixNano int64 `json:"unix_nano"`
}

// Hello tells who answers.
type Hello struct {
	ProtocolMin int    `json:"protocol_min"`
	ProtocolMax int    `json:"protocol_max"`
	ID          string `json:"id"`      // Identity.ID
	Nonce       string `json:"nonce"`   // of the request
	BootID      string `json:"boot_id"` // /proc/sys/kernel/random/boot_id
	User        string `json:"user"`    // the account that exec uses when none is named
	Home        string `json:"home"`    // its home directory
}

// Ready tells how far the system is.
type Ready struct {
	// System is "running", "degraded" or "none" (there is no init).
	System string `json:"system"`
}

// Started is the payload of KindStarted.
type Started struct {
	PID int `json:"pid"`
}

// Resize is the payload of KindResize.
type Resize struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`
}

// Signal is the payload of KindSignal: it goes to the command's process group.
type Signal struct {
	Name string `json:"name"` // "TERM", "INT", …
}

// Exit is the payload of KindExit: how the command, or the tar, ended.
type Exit struct {
	Code   int    `json:"code"`             // exit code, 128+n for a signal
	Signal string `json:"signal,omitempty"` // "KILL" when a signal ended it
	// Message says for tar and untar what went wrong when Code is not 0.
	Message string `json:"message,omitempty"`
}

// Error is the payload of KindError: the request could not be begun.
type Error struct {
	Code    string `json:"code"` // see the Err constants
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// Codes of Error.
const (
	ErrInvalid       = "invalid"
	ErrUnknownOp     = "unknown_op"
	ErrNotFound      = "not_found"      // the command, or the socket, does not exist: exit code 127
	ErrNotExecutable = "not_executable" // it cannot be executed: exit code 126
	ErrNoUser        = "no_user"
	ErrNoDir         = "no_dir" // Exec.Dir does not exist
	ErrInternal      = "internal"
	ErrOverloaded    = "overloaded"
	ErrRefused       = "refused" // nothing listens at Dial.Address
)

// Kind is the first byte of a frame.
type Kind byte

// The kinds of frames. Data kinds carry bytes, the others JSON or nothing.
const (
	KindRequest   Kind = 1  // host: Request
	KindStdin     Kind = 2  // host: bytes
	KindStdinEOF  Kind = 3  // host: empty; stdin is closed, the rest goes on
	KindResize    Kind = 4  // host: Resize
	KindSignal    Kind = 5  // host: Signal
	KindStdoutAck Kind = 6  // host: 4 bytes, big endian: so many more bytes of a Dial's stdout were taken
	KindStarted   Kind = 16 // guest: Started
	KindStdout    Kind = 17 // guest: bytes
	KindStderr    Kind = 18 // guest: bytes
	KindReply     Kind = 19 // guest, last: the reply of the operation
	KindExit      Kind = 20 // guest, last: Exit
	KindError     Kind = 21 // guest, last: Error
	KindStdinAck  Kind = 22 // guest: 4 bytes, big endian: so many more bytes of stdin were taken
	KindStdoutEOF Kind = 23 // guest: empty; the service of a Dial sends no more
)
