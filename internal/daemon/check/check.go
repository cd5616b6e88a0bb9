// Package check is the shape of what doctor asks of a machine: a Check names one
// thing, says what it is needed for, and looks. A check changes nothing and starts
// nothing that outlives it; mending is left to the one command that it names. Run
// turns a list of checks into a report in which every check has a line, also one
// that hung or panicked: that is Unknown, which is no promise either way.
package check

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"
)

// Timeout is how long one probe may take before its result is Unknown.
const Timeout = 15 * time.Second

// Result is how a check ended.
type Result int

const (
	// Unknown: the check itself could not be made.
	Unknown Result = iota
	OK
	// Warn: banger works, but slower or with less than it could have.
	Warn
	// Fail: something that banger needs is not there.
	Fail
)

// Check is one thing to look at.
type Check struct {
	Name    string // "kvm": short, of lower case, unique in a report
	Purpose string // what it is needed for: "guests at full speed"
	// Probe looks. It should return when ctx ends; one that does not is left behind.
	Probe func(ctx context.Context) Finding
	// Fix is the one command that mends what Probe may find, or empty. It is shown
	// unless the result is OK; a Finding with a Fix of its own knows better.
	Fix string
}

// Finding is what a probe saw.
type Finding struct {
	Result Result
	Text   string // what was found, in words: "/dev/kvm: permission denied"
	Fix    string // replaces Check.Fix when not empty
}

// Found makes a Finding.
func Found(r Result, format string, args ...any) Finding {
	return Finding{Result: r, Text: fmt.Sprintf(format, args...)}
}

// WithFix names the command that mends it.
func (f Finding) WithFix(format string, args ...any) Finding {
	f.Fix = fmt.Sprintf(format, args...)
	return f
}

// Outcome is one line of a report.
type Outcome struct {
	Name    string
	Purpose string
	Result  Result
	Finding string
	Fix     string // empty when the result is OK
}

// Run makes all checks, at the same time, and returns their outcomes in the order
// of the checks. It takes at most Timeout, however many there are.
func Run(ctx context.Context, checks []Check) []Outcome { return run(ctx, checks, Timeout) }

func run(ctx context.Context, checks []Check, timeout time.Duration) []Outcome {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	outcomes := make([]Outcome, len(checks))
	var all sync.WaitGroup
	for i, c := range checks {
		all.Go(func() { outcomes[i] = outcome(c, probe(ctx, c)) })
	}
	all.Wait()
	return outcomes
}

func outcome(c Check, f Finding) Outcome {
	o := Outcome{Name: c.Name, Purpose: c.Purpose, Result: f.Result, Finding: f.Text}
	if f.Result == OK {
		return o
	}
	if o.Fix = f.Fix; o.Fix == "" {
		o.Fix = c.Fix
	}
	return o
}

// probe calls c.Probe in a goroutine of its own, which it abandons when ctx ends:
// an open of a dead network mount returns when it likes.
func probe(ctx context.Context, c Check) Finding {
	found := make(chan Finding, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				found <- Found(Unknown, "the check broke: %v\n%s", p, debug.Stack())
			}
		}()
		found <- c.Probe(ctx)
	}()
	select {
	case f := <-found:
		return f
	case <-ctx.Done():
	}
	select {
	case f := <-found: // a probe that noticed the end knows more
		return f
	default:
		return Found(Unknown, "the check did not end: %v", context.Cause(ctx))
	}
}
