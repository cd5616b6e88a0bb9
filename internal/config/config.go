package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/pelletier/go-toml/v2"

	"banger/api"
)

// The bounds of a VM's resources.
const (
	MaxCPUs   = 255       // a guest's APIC id has 8 bits, of which 255 means all, see qemuproc
	MinMemory = 128 << 20 // bytes; a kernel and its initramfs do not boot with less
	MinDisk   = 64 << 20  // bytes
	// MaxDisk is how far an ext4 that banger made can grow while it is mounted.
	MaxDisk = 1 << 40 // bytes
)

// Config is what new VMs get when nothing is asked for, and how the daemon runs.
type Config struct {
	Image    string // "debian-bookworm"
	Kernel   string // "debian-cloud"; what kernel pull gets when none is named
	CPUs     int
	Memory   int64  // bytes, a multiple of 1 MiB
	Disk     int64  // bytes, a multiple of 1 MiB
	Network  string // "internet"; a preset of package netpolicy
	LogLevel slog.Level
	KVM      KVM
	// DiskDriver is how the disks of new VMs are made: DiskAuto, or a driver's name.
	DiskDriver string
}

// DiskAuto is the cheapest way that works on the host.
const DiskAuto = "auto"

// KVM says whether /dev/kvm is used.
type KVM string

// The values of KVM.
const (
	KVMAuto KVM = "auto" // where it works
	KVMOff  KVM = "off"
)

// Host is what defaults are computed from.
type Host struct {
	CPUs   int
	Memory int64 // bytes
}

// ThisHost asks the kernel: the CPUs that this process may use, and all of the memory.
func ThisHost() (Host, error) {
	var si syscall.Sysinfo_t
	if err := syscall.Sysinfo(&si); err != nil {
		return Host{}, fmt.Errorf("cannot read the host's memory: %w", err)
	}
	return Host{CPUs: runtime.NumCPU(), Memory: int64(si.Totalram) * int64(si.Unit)}, nil
}

// Default is the configuration of a host without config.toml: min(4, host) CPUs,
// min(4 GiB, a quarter of the host) of memory, a disk of 20 GiB, and the public internet.
func Default(h Host) Config {
	memory := max(min(4<<30, h.Memory/4), MinMemory)
	return Config{
		Image:    "debian-bookworm",
		Kernel:   "debian-cloud",
		CPUs:     max(min(4, h.CPUs), 1),
		Memory:   memory &^ (1<<20 - 1),
		Disk:     20 << 30,
		Network:  "internet",
		LogLevel: slog.LevelInfo,
		KVM:      KVMAuto,

		DiskDriver: DiskAuto,
	}
}

// Load reads the configuration of this process's user over the defaults of h:
// $BANGER_CONFIG, which must exist then, else banger/config.toml in
// $XDG_CONFIG_HOME or ~/.config. What is wrong in it is an api.Invalid that names
// file, line and key.
func Load(h Host) (Config, error) {
	path, explicit := os.Getenv("BANGER_CONFIG"), true
	if path == "" {
		base, err := xdg("XDG_CONFIG_HOME", ".config")
		if err != nil {
			return Default(h), nil // no home, so no file in it
		}
		path, explicit = filepath.Join(base, "banger", "config.toml"), false
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !explicit {
		return Default(h), nil
	}
	if err != nil {
		hint := "$EDITOR " + path
		if explicit {
			hint = "unset BANGER_CONFIG"
		}
		return Config{}, api.Errorf(api.Invalid, "cannot read the configuration: %w", err).WithHint("%s", hint)
	}
	c, err := Parse(path, data, h)
	var e *api.Error
	if errors.As(err, &e) && e.Hint == "" {
		return Config{}, &api.Error{Code: e.Code, Message: e.Message, Hint: "$EDITOR " + path, Err: e}
	}
	return c, err
}

// file is config.toml. It is decoded as far as TOML's own types go, then with the
// values checked: the decoder hands any type to UnmarshalText, and does not say on
// which line.
type file[M, D, N, L, K, V any] struct {
	Image    *string `toml:"image"`
	Kernel   *string `toml:"kernel"`
	CPUs     *int    `toml:"cpus"`
	Memory   *M      `toml:"memory"`
	Disk     *D      `toml:"disk"`
	Network  *N      `toml:"network"`
	LogLevel *L      `toml:"log_level"`
	KVM      *K      `toml:"kvm"`

	DiskDriver *V `toml:"disk_driver"`
}

// Parse reads the contents of a config.toml over the defaults of h; path is for messages.
func Parse(path string, data []byte, h Host) (Config, error) {
	var f file[memory, disk, preset, level, kvmMode, diskDriver]
	for _, into := range []any{&file[string, string, string, string, string, string]{}, &f} {
		if err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(into); err != nil {
			return Config{}, describe(path, err)
		}
	}
	c := Default(h)
	set(&c.Image, f.Image)
	set(&c.Kernel, f.Kernel)
	set(&c.CPUs, f.CPUs)
	if f.Memory != nil {
		c.Memory = f.Memory.bytes
	}
	if f.Disk != nil {
		c.Disk = f.Disk.bytes
	}
	if f.Network != nil {
		c.Network = f.Network.name
	}
	if f.LogLevel != nil {
		c.LogLevel = f.LogLevel.level
	}
	if f.KVM != nil {
		c.KVM = f.KVM.value
	}
	if f.DiskDriver != nil {
		c.DiskDriver = f.DiskDriver.name
	}
	if c.Image == "" || c.Kernel == "" {
		return Config{}, api.Errorf(api.Invalid, "%s: image and kernel must not be empty", path)
	}
	if err := ValidateCPUs(c.CPUs); err != nil {
		return Config{}, api.Errorf(api.Invalid, "%s: cpus: %w", path, err)
	}
	return c, nil
}

func set[T any](to, from *T) {
	if from != nil {
		*to = *from
	}
}

// describe says where in the file the mistake is, one line per mistake.
func describe(path string, err error) error {
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		var lines []string
		for _, e := range unknown.Errors {
			line, _ := e.Position()
			lines = append(lines, fmt.Sprintf("%s:%d: unknown key %q", path, line, strings.Join(e.Key(), ".")))
		}
		return &api.Error{Code: api.Invalid, Message: strings.Join(lines, "\n"), Err: err}
	}
	var wrong *toml.DecodeError
	if errors.As(err, &wrong) {
		line, _ := wrong.Position()
		message := strings.TrimPrefix(wrong.Error(), "toml: ")
		// "cannot decode TOML integer into struct field config.file[…].Memory of type string"
		if is, must, ok := strings.Cut(message, " into struct field "); ok {
			message = fmt.Sprintf("it is a TOML %s, not of type %s", strings.TrimPrefix(is, "cannot decode TOML "), must[strings.LastIndex(must, " ")+1:])
		}
		if key := strings.Join(wrong.Key(), "."); key != "" {
			message = key + ": " + message
		}
		return &api.Error{Code: api.Invalid, Message: fmt.Sprintf("%s:%d: %s", path, line, message), Err: err}
	}
	return &api.Error{Code: api.Invalid, Message: fmt.Sprintf("%s: %v", path, err), Err: err}
}

// The types of the values in the file: each is checked where the decoder knows the
// line. They are structs, because the decoder does not ask a type whose kind is a
// string or a number.
type (
	memory  struct{ bytes int64 }
	disk    struct{ bytes int64 }
	preset  struct{ name string }
	level   struct{ level slog.Level }
	kvmMode struct{ value KVM }

	diskDriver struct{ name string }
)

func (m *memory) UnmarshalText(b []byte) (err error) {
	if m.bytes, err = ParseSize(string(b)); err != nil {
		return err
	}
	return ValidateMemory(m.bytes)
}

func (d *disk) UnmarshalText(b []byte) (err error) {
	if d.bytes, err = ParseSize(string(b)); err != nil {
		return err
	}
	return ValidateDisk(d.bytes)
}

func (p *preset) UnmarshalText(b []byte) error {
	switch s := string(b); s {
	case "none", "internet", "lan", "host": // a test in package daemon holds them against netpolicy
		p.name = s
		return nil
	default:
		return fmt.Errorf("%q is none of none, internet, lan, host", s)
	}
}

func (l *level) UnmarshalText(b []byte) error {
	switch s := string(b); s {
	case "debug", "info", "warn", "error":
		return l.level.UnmarshalText(b)
	default:
		return fmt.Errorf("%q is none of debug, info, warn, error", s)
	}
}

func (k *kvmMode) UnmarshalText(b []byte) error {
	switch v := KVM(b); v {
	case KVMAuto, KVMOff:
		k.value = v
		return nil
	default:
		return fmt.Errorf("%q is none of auto, off", v)
	}
}

func (d *diskDriver) UnmarshalText(b []byte) error {
	switch s := string(b); s {
	case DiskAuto, "reflink", "qcow2", "dm-snapshot", "copy": // a test in package daemon holds them against the drivers
		d.name = s
		return nil
	default:
		return fmt.Errorf("%q is none of auto, reflink, qcow2, dm-snapshot, copy", s)
	}
}

// ValidateCPUs checks a number of CPUs. Its error and those of the two below are
// api.Invalid.
func ValidateCPUs(n int) error {
	if n < 1 || n > MaxCPUs {
		return api.Errorf(api.Invalid, "a VM has from 1 to %d CPUs, not %d", MaxCPUs, n)
	}
	return nil
}

// ValidateMemory checks a size of memory, in bytes.
func ValidateMemory(n int64) error {
	if n < MinMemory {
		return api.Errorf(api.Invalid, "a VM needs at least %s of memory, not %s", FormatSize(MinMemory), FormatSize(n))
	}
	return wholeMiB(n)
}

// ValidateDisk checks the size of a disk, in bytes.
func ValidateDisk(n int64) error {
	if n < MinDisk || n > MaxDisk {
		return api.Errorf(api.Invalid, "a disk has from %s to %s, not %s", FormatSize(MinDisk), FormatSize(MaxDisk), FormatSize(n))
	}
	return wholeMiB(n)
}

func wholeMiB(n int64) error {
	if n%(1<<20) != 0 {
		return api.Errorf(api.Invalid, "%d bytes are no multiple of 1M", n)
	}
	return nil
}
