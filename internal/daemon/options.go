package daemon

import (
	"io/fs"
	"log/slog"
	"time"

	"banger/internal/config"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/image"
	"banger/internal/daemon/locks"
)

// Option changes what Open wires.
type Option func(*options)

type options struct {
	layout       *config.Layout
	programs     fs.FS
	build        Build
	logger       *slog.Logger
	host         *driver.Host
	system       bool
	builder      image.Builder
	checker      *locks.Checker
	agentTimeout time.Duration
	hook         func(point string) error
}

// Build identifies the program.
type Build struct {
	Version string // "0.1.0"
	ID      string // differs between any two builds
}

// WithBuild says which program this is.
func WithBuild(b Build) Option { return func(o *options) { o.build = b } }

// WithSystem makes it the system's daemon: root, Firecracker in a jail, and the state
// directory of config.SystemDir.
func WithSystem() Option { return func(o *options) { o.system = true } }

// WithLayout takes the state directory from the caller instead of the environment.
func WithLayout(l config.Layout) Option { return func(o *options) { o.layout = &l } }

// WithPrograms gives banger-shim, banger-guest and banger-net, at the top of programs.
func WithPrograms(programs fs.FS) Option { return func(o *options) { o.programs = programs } }

// WithLogger takes the log from the caller instead of bangerd.log.
func WithLogger(l *slog.Logger) Option { return func(o *options) { o.logger = l } }

// WithHost wires these drivers instead of probing the machine; tests give the fake
// host.
func WithHost(h driver.Host) Option { return func(o *options) { o.host = &h } }

// WithImageBuilder replaces what makes images and kernels.
func WithImageBuilder(b image.Builder) Option { return func(o *options) { o.builder = b } }

// WithChecker makes every ranked lock report to c.
func WithChecker(c *locks.Checker) Option { return func(o *options) { o.checker = c } }

// WithAgentTimeout bounds how long a guest may take to answer after its start.
func WithAgentTimeout(d time.Duration) Option { return func(o *options) { o.agentTimeout = d } }

// WithHook calls hook at each step of an operation on a VM; an error from it fails
// the step.
func WithHook(hook func(point string) error) Option { return func(o *options) { o.hook = hook } }
