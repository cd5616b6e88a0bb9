package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/guest/wire"
)

// The exit codes of banger's own. run, up and exec pass the guest's code on, so
// there banger's failures are the codes that shells and docker use for them.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitNotReady    = 4
	exitRefused     = 5
	exitOwnFailure  = 125
	exitNoExecute   = 126
	exitNoCommand   = 127
	exitInterrupted = 130
	exitBrokenPipe  = 141 // 128 + SIGPIPE
)

// guestExits marks, in a command's annotations, those that pass the guest's code on.
const guestExits = "guest"

// exit ends the command with this code; what there was to say has been said.
type exit int

func (e exit) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// guestError is a failure that the guest's agent reported before the command ran.
type guestError struct{ code, message string }

func (e *guestError) Error() string { return e.message }

var errInterrupted = errors.New("interrupted")

// usage makes an error of the arguments.
func usage(cmd *cobra.Command, format string, args ...any) *api.Error {
	return api.Errorf(api.Invalid, format, args...).WithHint("%s --help", cmd.CommandPath())
}

// asError finds the code, message and hint of any error of a command.
func asError(err error) *api.Error {
	var e *api.Error
	if errors.As(err, &e) {
		return e
	}
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return &api.Error{Code: api.Internal, Message: err.Error(), Err: err}
	}
	for _, d := range ce.Details() {
		if v, err := d.Value(); err == nil {
			if detail, ok := v.(*bangerv1.ErrorDetail); ok {
				return detailError(detail)
			}
		}
	}
	switch ce.Code() {
	case connect.CodeUnimplemented:
		return api.Errorf(api.UnknownMethod, "the running daemon does not know this call").WithHint("banger daemon stop")
	case connect.CodePermissionDenied:
		return api.Errorf(api.Refused, "the daemon refuses to serve this user: %s", ce.Message()).WithHint("banger daemon status")
	case connect.CodeDeadlineExceeded:
		return api.Errorf(api.Unresponsive, "the daemon did not answer in time").WithHint("banger daemon status")
	case connect.CodeInvalidArgument:
		return api.Errorf(api.Invalid, "%s", ce.Message())
	}
	return api.Errorf(api.Internal, "lost the connection to the daemon: %s", ce.Message()).WithHint("banger daemon status")
}

func detailError(d *bangerv1.ErrorDetail) *api.Error {
	return &api.Error{Code: api.Code(d.Code), Message: d.Message, Hint: d.Hint}
}

// rehint gives err, which may be nil, what change makes of its hint.
func rehint(err error, change func(hint string) string) error {
	if err == nil {
		return nil
	}
	e := asError(err)
	hint := change(e.Hint)
	if hint == e.Hint {
		return err
	}
	return &api.Error{Code: e.Code, Message: e.Message, Hint: hint, Err: err}
}

func codeOf(err error) api.Code {
	if err == nil {
		return ""
	}
	return asError(err).Code
}

// isLost tells a broken connection, and no daemon or one that is about to end, from an
// answer and from a refusal of banger's own.
func isLost(err error) bool {
	if errors.Is(err, errNoDaemon) || codeOf(err) == api.Stopping {
		return true
	}
	var e *api.Error
	var ce *connect.Error
	if errors.As(err, &e) || !errors.As(err, &ce) || len(ce.Details()) > 0 {
		return false
	}
	switch ce.Code() {
	case connect.CodeUnavailable, connect.CodeUnknown, connect.CodeInternal, connect.CodeInvalidArgument:
		return true
	case connect.CodeCanceled: // Connect's name for a connection that was reset, too
		return !errors.Is(err, context.Canceled)
	}
	return false
}

// isBrokenPipe tells that nobody reads what banger prints. The same errno on the way
// to the daemon is something else.
func isBrokenPipe(err error) bool {
	var pe *fs.PathError
	return errors.As(err, &pe) && errors.Is(pe, syscall.EPIPE)
}

// exitCodeOf is the one place where errors become exit codes.
func exitCodeOf(err error, guest bool) int {
	var code exit
	var ge *guestError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &code):
		return int(code)
	case errors.Is(err, errInterrupted), errors.Is(err, context.Canceled):
		return exitInterrupted
	case isBrokenPipe(err):
		return exitBrokenPipe
	case errors.As(err, &ge) && ge.code == wire.ErrNotFound:
		return exitNoCommand
	case errors.As(err, &ge) && ge.code == wire.ErrNotExecutable:
		return exitNoExecute
	}
	e := asError(err)
	if e.Code == api.Cancelled {
		return exitInterrupted
	}
	if guest {
		return exitOwnFailure
	}
	switch e.Code {
	case api.Invalid, api.Ambiguous:
		return exitUsage
	case api.NotFound:
		return exitNotFound
	case api.NotReady:
		return exitNotReady
	case api.Busy, api.Refused, api.Exists, api.Stopping:
		return exitRefused
	}
	return exitFailed
}

// finish says what went wrong with cmd and returns the exit code.
func (a *app) finish(cmd *cobra.Command, err error) int {
	a.ui.clear()
	if a.signals.interrupted() && isLost(err) {
		err = errInterrupted // what was cancelled shows as a broken connection, too
	}
	code := exitCodeOf(err, cmd.Annotations[guestExits] != "")
	if err != nil {
		a.report(err)
	}
	return code
}

// report prints an error, unless it has been said already.
func (a *app) report(err error) {
	var said exit
	switch {
	case errors.As(err, &said), isBrokenPipe(err):
		return
	case errors.Is(err, errInterrupted), errors.Is(err, context.Canceled):
		err = &api.Error{Code: api.Cancelled, Message: "interrupted"}
	}
	var e *api.Error
	var ge *guestError
	if errors.As(err, &ge) {
		e = &api.Error{Code: api.Code(ge.code), Message: ge.message}
	} else {
		e = asError(err)
	}
	if a.json {
		line, _ := json.Marshal(map[string]any{"error": map[string]string{
			"code": string(e.Code), "message": clean(e.Message), "hint": clean(e.Hint)}})
		a.ui.print(string(line))
		return
	}
	lines := strings.Split(strings.TrimRight(clean(e.Message), "\n"), "\n")
	a.ui.print("banger: " + strings.Join(lines, "\n  "))
	if e.Hint != "" {
		a.ui.print("hint: " + clean(e.Hint))
	}
}
