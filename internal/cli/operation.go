package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
)

// reconnectTimeout bounds how long a watch or a lease is taken up again after the
// daemon went away.
const reconnectTimeout = 10 * time.Second

// watch is how an operation is waited for.
type watch struct {
	label  string                    // before each progress line, for several at once
	ctx    context.Context           // ends the waiting at once
	cancel context.Context           // its end cancels the operation; nil: it is left alone
	seen   func(*bangerv1.Operation) // called for each message; may be nil
}

// await watches an operation to its end, with progress. The first Ctrl-C cancels it
// and waits until it is undone, the second leaves.
func (a *app) await(c *client, op *bangerv1.Operation) (*bangerv1.Operation, error) {
	return a.watch(c, op, watch{ctx: a.signals.hard, cancel: a.signals.soft})
}

func (a *app) watch(c *client, op *bangerv1.Operation, w watch) (*bangerv1.Operation, error) {
	p := &progress{ui: a.ui, label: w.label}
	defer a.ui.clear()
	var asked <-chan struct{}
	if w.cancel != nil {
		asked = w.cancel.Done()
	}
	messages, stop := a.follow(w.ctx, c, op)
	defer stop()
	cancelled := false
	for {
		select {
		case m, ok := <-messages:
			if !ok {
				if asked != nil && w.cancel.Err() != nil {
					// Two Ctrl-C came as one: the daemon has to know of the first all the same.
					a.cancelOperation(w.ctx, c, op)
				}
				return op, errInterrupted
			}
			if m.err != nil {
				return op, m.err
			}
			op = m.op
			if w.seen != nil {
				w.seen(op)
			}
			if op.State != bangerv1.Operation_RUNNING {
				return op, outcome(op, cancelled)
			}
			p.show(op)
		case <-asked:
			asked, cancelled = nil, true
			a.ui.note("cancelling, waiting for rollback (Ctrl-C again leaves)")
			if err := a.cancelOperation(w.ctx, c, op); err != nil && w.ctx.Err() == nil && !isLost(err) {
				return op, err
			}
		}
	}
}

// cancelOperation asks for the end of op. After the end of ctx, at the second Ctrl-C, it
// goes on for as long as a daemon that is well needs to hear of it.
func (a *app) cancelOperation(ctx context.Context, c *client, op *bangerv1.Operation) error {
	call, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(time.Second, end) })()
	_, err := c.operations.Cancel(call, &bangerv1.CancelOperationRequest{Id: op.Id})
	return err
}

// outcome is how a finished operation ended, as an error.
func outcome(op *bangerv1.Operation, cancelled bool) error {
	switch {
	case op.State == bangerv1.Operation_DONE && cancelled:
		return errInterrupted // too late to undo it, but the user wants no more
	case op.State == bangerv1.Operation_DONE:
		return nil
	case cancelled && (op.State == bangerv1.Operation_CANCELLED || op.GetError().GetCode() == string(api.Cancelled)):
		return errInterrupted
	case op.Error != nil:
		return detailError(op.Error)
	case op.State == bangerv1.Operation_CANCELLED:
		return api.Errorf(api.Cancelled, "operation %s (%s %s) was cancelled", op.Id, op.Kind, op.Target)
	}
	return api.Errorf(api.Internal, "operation %s (%s %s) failed", op.Id, op.Kind, op.Target)
}

type message struct {
	op  *bangerv1.Operation
	err error
}

// follow sends op and all that becomes of it. After a loss of the daemon it takes the
// watch up again. The channel is closed when ctx ends.
func (a *app) follow(ctx context.Context, c *client, op *bangerv1.Operation) (<-chan message, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	out := make(chan message)
	send := func(m message) bool {
		select {
		case out <- m:
			return true
		case <-ctx.Done():
			return false
		}
	}
	go func() {
		defer close(out)
		if op.State != bangerv1.Operation_RUNNING {
			send(message{op: op})
			return
		}
		for {
			err := followOnce(ctx, c, op.Id, send)
			if err == nil || ctx.Err() != nil {
				return
			}
			if isLost(err) {
				err = a.regain(ctx, c, op)
			}
			if err != nil {
				send(message{err: err})
				return
			}
		}
	}()
	return out, cancel
}

// followOnce passes the messages of one stream on; nil after the last one.
func followOnce(ctx context.Context, c *client, id string, send func(message) bool) error {
	stream, err := c.operations.Watch(ctx, &bangerv1.WatchOperationRequest{Id: id})
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		m := stream.Msg()
		if !send(message{op: m}) || m.State != bangerv1.Operation_RUNNING {
			return nil
		}
	}
	if err := stream.Err(); err != nil {
		return err
	}
	return errNoDaemon // the stream ended without the last message
}

// regain finds out, after the daemon went away, whether the operation lives on. It
// starts a daemon if need be: only a daemon can undo what was half done.
func (a *app) regain(ctx context.Context, c *client, op *bangerv1.Operation) error {
	ctx, cancel := context.WithTimeout(ctx, reconnectTimeout)
	defer cancel()
	err := a.ensure(ctx, c)
	if err == nil {
		var list *bangerv1.ListOperationsResponse
		if list, err = c.operations.List(ctx, &bangerv1.ListOperationsRequest{}); err == nil {
			for _, o := range list.Operations {
				if o.Id == op.Id {
					return nil
				}
			}
			err = errors.New("it undid what was half done")
		}
	}
	what := op.Kind
	if op.Target != "" {
		what += " " + op.Target
	}
	return api.Errorf(api.Internal, "the daemon ended during %s: %s", what, asError(err).Message).WithHint("banger ps")
}

// progress shows the steps of one operation.
type progress struct {
	ui    *ui
	label string
	last  string    // the step that was shown last
	drawn time.Time // when a line was last rewritten
}

// redraw is how often bytes are shown anew within a step.
const redraw = 100 * time.Millisecond

func (p *progress) show(op *bangerv1.Operation) {
	if op.StepName == "" {
		return
	}
	step := cleanLine(op.StepName)
	if op.Steps > 0 {
		step = fmt.Sprintf("%d/%d %s", op.Step, op.Steps, step)
	}
	if p.label != "" {
		step = p.label + ": " + step
	}
	if !p.ui.terminal {
		if step != p.last {
			p.ui.note("%s", step)
		}
		p.last = step
		return
	}
	if step == p.last && time.Since(p.drawn) < redraw {
		return
	}
	p.last, p.drawn = step, time.Now()
	p.ui.rewrite(step + bytesOf(op))
}

func bytesOf(op *bangerv1.Operation) string {
	switch {
	case op.BytesTotal > 0:
		return fmt.Sprintf(" %s/%s", config.FormatSize(op.BytesDone), config.FormatSize(op.BytesTotal))
	case op.BytesDone > 0:
		return " " + config.FormatSize(op.BytesDone)
	}
	return ""
}
