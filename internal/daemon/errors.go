package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"connectrpc.com/connect"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/store"
)

// asAPIError gives every error a code, and those that carry none a place in the
// log: they are defects.
func asAPIError(err error) *api.Error {
	var e *api.Error
	if errors.As(err, &e) {
		if message := err.Error(); message != e.Message {
			return &api.Error{Code: e.Code, Message: message, Hint: e.Hint, Err: err}
		}
		return e
	}
	code := api.Internal
	switch {
	case errors.Is(err, context.Canceled):
		code = api.Cancelled
	case errors.Is(err, context.DeadlineExceeded):
		code = api.Unresponsive
	case errors.Is(err, store.ErrFull):
		code = api.NoSpace
	}
	return &api.Error{Code: code, Message: err.Error(), Err: err}
}

func errorDetail(err error) *bangerv1.ErrorDetail {
	e := asAPIError(err)
	return &bangerv1.ErrorDetail{Code: string(e.Code), Message: e.Message, Hint: e.Hint}
}

// connectCode is the nearest of Connect's codes: clients that know banger look at
// ErrorDetail.
func connectCode(code api.Code) connect.Code {
	switch code {
	case api.Invalid, api.Ambiguous:
		return connect.CodeInvalidArgument
	case api.NotFound:
		return connect.CodeNotFound
	case api.Exists:
		return connect.CodeAlreadyExists
	case api.Busy, api.Refused:
		return connect.CodeFailedPrecondition
	case api.NotReady, api.Stopping:
		return connect.CodeUnavailable
	case api.NoSpace:
		return connect.CodeResourceExhausted
	case api.Cancelled:
		return connect.CodeCanceled
	case api.Unresponsive:
		return connect.CodeDeadlineExceeded
	case api.UnknownMethod:
		return connect.CodeUnimplemented
	}
	return connect.CodeInternal
}

func toConnect(err error) *connect.Error {
	detail := errorDetail(err)
	ce := connect.NewError(connectCode(api.Code(detail.Code)), errors.New(detail.Message))
	if d, derr := connect.NewErrorDetail(detail); derr == nil {
		ce.AddDetail(d)
	}
	return ce
}

// errorInterceptor turns the errors of all handlers into Connect errors.
type errorInterceptor struct{ d *Daemon }

func (i errorInterceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		res, err := next(ctx, req)
		if err != nil {
			return nil, i.convert(req.Spec().Procedure, err)
		}
		return res, nil
	}
}

func (i errorInterceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (i errorInterceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if err := next(ctx, conn); err != nil {
			return i.convert(conn.Spec().Procedure, err)
		}
		return nil
	}
}

func (i errorInterceptor) convert(procedure string, err error) error {
	if _, already := err.(*connect.Error); already {
		return err
	}
	if e := asAPIError(err); e.Code == api.Internal {
		i.d.log.Error("a call failed", "method", procedure, "err", err)
	}
	return toConnect(err)
}

// writeError answers a plain HTTP request with an error.
func writeError(w http.ResponseWriter, status int, err error) {
	d := errorDetail(err)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]string{"code": d.Code, "message": d.Message, "hint": d.Hint})
}
