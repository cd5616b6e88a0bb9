// Package api holds what the wire contract in banger/v1 cannot say: the codes of
// errors and the Go error type that carries them from a manager, through the
// socket, to the exit code of the CLI.
package api

import (
	"errors"
	"fmt"
)

// Code classifies an error for programs. The set only grows.
type Code string

const (
	Invalid       Code = "invalid"        // the request makes no sense, whatever the state
	NotFound      Code = "not_found"      // the named thing does not exist
	Ambiguous     Code = "ambiguous"      // a prefix that fits several things
	Exists        Code = "exists"         // the name is taken
	Busy          Code = "busy"           // something else holds it now; trying later may work
	Refused       Code = "refused"        // the state of things does not allow it
	NotReady      Code = "not_ready"      // the host lacks something
	NoSpace       Code = "no_space"       // the disk is full
	Cancelled     Code = "cancelled"      // somebody asked for it to end
	Unresponsive  Code = "unresponsive"   // the guest did not answer in time
	Ended         Code = "ended"          // the VM ended where it should have run
	Stopping      Code = "stopping"       // the daemon is about to end; the next one can be asked
	UnknownMethod Code = "unknown_method" // the daemon does not know the call
	Internal      Code = "internal"       // a defect of banger
)

// Error is an error with a code, a message for people and one hint.
type Error struct {
	Code    Code
	Message string // what failed: "cannot start shop: no space left on device"
	Hint    string // one command that helps, or empty
	Err     error  // the cause, nil when the message says all
}

func (e *Error) Error() string { return e.Message }
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an Error. A %w among the arguments becomes its cause.
func Errorf(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Err: errors.Unwrap(err)}
}

// WithHint adds the hint and returns e.
func (e *Error) WithHint(format string, args ...any) *Error {
	e.Hint = fmt.Sprintf(format, args...)
	return e
}

// CodeOf finds the code of err, Internal when it carries none, "" for nil.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return Internal
}

// HintOf finds the hint of err.
func HintOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Hint
	}
	return ""
}
