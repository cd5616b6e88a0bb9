package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	bangerv1 "banger/api/banger/v1"
)

// tailValue is a number of lines; below zero means all.
type tailValue int

func (v *tailValue) Type() string { return "N" }

func (v *tailValue) String() string {
	if *v < 0 {
		return ""
	}
	return strconv.Itoa(int(*v))
}

func (v *tailValue) Set(s string) error {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return fmt.Errorf("%q is no number of lines", s)
	}
	*v = tailValue(n)
	return nil
}

func (a *app) logsCommand() *cobra.Command {
	var network, follow bool
	tail := tailValue(-1)
	cmd := &cobra.Command{
		Use:   "logs [VM]",
		Short: "what a VM's network refused",
		Long: `Logs --network prints what the network of a VM, by default that of the repository here,
refused: when, what, why, and the command that would allow it. Many alike are one line
with their number. With -f it goes on until Ctrl-C, or until the VM is removed.`,
		Example: `  banger logs shop --network
  banger logs --network -f --tail 0`,
		Args:        arguments(0, 1, "VM"),
		Annotations: exits(),
	}
	fs := cmd.Flags()
	fs.BoolVar(&network, "network", false, "what the network refused")
	fs.BoolVarP(&follow, "follow", "f", false, "go on with what comes")
	fs.Var(&tail, "tail", "only the last N lines of what was before (default: all)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !network {
			hint := "banger logs --network"
			if len(args) == 1 {
				hint = "banger logs " + shellWord(args[0]) + " --network"
			}
			return usage(cmd, "name a log: there is that of the network").WithHint("%s", hint)
		}
		c, err := a.connect(cmd.Context())
		if err != nil {
			return err
		}
		defer c.close()
		vm, err := a.showOrHere(cmd.Context(), c, args)
		if err != nil {
			return err
		}
		l := &networkLog{app: a, client: c, vm: vm}
		return l.print(cmd.Context(), int(tail), follow)
	}
	return cmd
}

// networkLog prints the refusals of one VM.
type networkLog struct {
	*app
	client *client
	vm     *bangerv1.VM
	last   *bangerv1.NetworkLogEntry // that was read
	seen   int                       // entries up to it, of the whole log
}

// print prints the last tail entries, below zero all, and with follow those that come.
func (l *networkLog) print(ctx context.Context, tail int, follow bool) error {
	if tail < 0 {
		return l.readOn(ctx, follow, l.entry)
	}
	var kept []*bangerv1.NetworkLogEntry
	err := l.readOn(ctx, false, func(e *bangerv1.NetworkLogEntry) error {
		if kept = append(kept, e); len(kept) > tail {
			kept = kept[1:]
		}
		return nil
	})
	for _, e := range kept {
		if err == nil {
			err = l.entry(e)
		}
	}
	if err == nil && follow {
		err = l.readOn(ctx, true, l.entry)
	}
	return err
}

// readOn is read, and goes on with the next daemon when one goes away.
func (l *networkLog) readOn(ctx context.Context, follow bool, each func(*bangerv1.NetworkLogEntry) error) error {
	var lost time.Time
	for {
		begun := time.Now()
		err := l.read(ctx, follow, func(e *bangerv1.NetworkLogEntry) error {
			lost = time.Time{}
			return each(e)
		})
		if ctx.Err() != nil {
			return errInterrupted
		}
		if !isLost(err) {
			return err
		}
		if lost.IsZero() || time.Since(begun) > reconnectTimeout { // it is another daemon that goes
			lost = time.Now()
		}
		if time.Since(lost) > reconnectTimeout {
			return err
		}
		retry, cancel := context.WithTimeout(ctx, reconnectTimeout)
		err = l.ensure(retry, l.client)
		cancel()
		if err != nil {
			return err
		}
		select { // a daemon that breaks every stream is not asked without a pause
		case <-time.After(pollInterval):
		case <-ctx.Done():
		}
	}
}

// read passes on the entries behind the last one that was read.
func (l *networkLog) read(ctx context.Context, follow bool, each func(*bangerv1.NetworkLogEntry) error) error {
	if l.last != nil {
		if err := l.catchUp(ctx, each); err != nil || !follow {
			return err
		}
	}
	// The log was whole a moment ago, so the last one that was read is in it again, and
	// earlier at most, if the log was rotated.
	before, known := l.last, l.seen
	seen := 0
	return l.stream(ctx, follow, func(e *bangerv1.NetworkLogEntry) error {
		seen++
		if before != nil && seen <= known {
			if proto.Equal(e, before) {
				before, l.seen = nil, seen
			}
			return nil
		}
		l.last, l.seen = e, seen
		return each(e)
	})
}

// catchUp passes on what the log has behind the last one that was read, and says so when
// that has gone: the log keeps so much and no more.
func (l *networkLog) catchUp(ctx context.Context, each func(*bangerv1.NetworkLogEntry) error) error {
	var all []*bangerv1.NetworkLogEntry // some thousands, as the log is bounded
	err := l.stream(ctx, false, func(e *bangerv1.NetworkLogEntry) error {
		all = append(all, e)
		return nil
	})
	if err != nil {
		return err
	}
	at := slices.IndexFunc(all, func(e *bangerv1.NetworkLogEntry) bool { return proto.Equal(e, l.last) })
	if at < 0 {
		l.ui.print("some refusals are lost here: the log was written over before they were read")
		l.last = nil
	}
	l.seen = at + 1
	for _, e := range all[at+1:] {
		l.last, l.seen = e, l.seen+1
		if err := each(e); err != nil {
			return err
		}
	}
	return nil
}

// stream passes on all entries of the log, and with follow those that come.
func (l *networkLog) stream(ctx context.Context, follow bool, each func(*bangerv1.NetworkLogEntry) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := l.client.vms.NetworkLog(ctx, &bangerv1.NetworkLogRequest{Ref: l.vm.Id, Follow: follow})
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		if err := each(stream.Msg()); err != nil {
			return err
		}
	}
	return stream.Err()
}

func (l *networkLog) entry(e *bangerv1.NetworkLogEntry) error {
	line := refusalLine(e, l.vm.Name, l.now())
	if l.json {
		b, err := marshal(e)
		if err != nil {
			return err
		}
		var out bytes.Buffer
		if err := json.Compact(&out, b); err != nil {
			return err
		}
		line = cleanJSON(out.String())
	}
	_, err := fmt.Fprintln(l.stdout, line)
	return err
}

// refusalLine is one refusal as people read it. All but the time comes from the guest.
func refusalLine(e *bangerv1.NetworkLogEntry, vm string, now time.Time) string {
	at, layout := e.At.AsTime().Local(), time.TimeOnly
	if day := now.Local(); at.YearDay() != day.YearDay() || at.Year() != day.Year() {
		layout = time.DateTime
	}
	line := at.Format(layout) + " " + cmp.Or(e.Event, "refused")
	if e.Protocol != "" {
		line += " " + e.Protocol
	}
	line += " " + e.Target
	if e.Name != "" && !strings.HasPrefix(e.Target, e.Name) { // of a lookup it is the target
		line += " (" + e.Name + ")"
	}
	line += " " + e.Reason
	if e.Count > 1 {
		line += fmt.Sprintf(" (×%d)", e.Count)
	}
	line = cleanLine(line)
	if e.Rule != "" {
		line = fmt.Sprintf("%-55s  hint: banger set %s --allow %s", line, vm, shellWord(cleanLine(e.Rule)))
	} else if e.Hint != "" {
		line = fmt.Sprintf("%-55s  hint: %s", line, cleanLine(e.Hint))
	}
	return line
}
