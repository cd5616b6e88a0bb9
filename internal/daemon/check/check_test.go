package check

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func found(f Finding) func(context.Context) Finding {
	return func(context.Context) Finding { return f }
}

func TestReportKeepsOrderAndFixes(t *testing.T) {
	later := make(chan struct{})
	got := Run(t.Context(), []Check{
		{Name: "a", Purpose: "pa", Fix: "mend a", Probe: func(context.Context) Finding {
			<-later // only the second check lets the first one go on
			return Found(Fail, "no %s", "a")
		}},
		{Name: "b", Purpose: "pb", Fix: "mend b", Probe: func(context.Context) Finding {
			close(later)
			return Found(OK, "b is there")
		}},
		{Name: "c", Purpose: "pc", Fix: "mend c", Probe: found(Found(Warn, "half of c").WithFix("mend %s better", "c"))},
		{Name: "d", Purpose: "pd", Probe: found(Finding{})},
	})
	want := []Outcome{
		{Name: "a", Purpose: "pa", Result: Fail, Finding: "no a", Fix: "mend a"},
		{Name: "b", Purpose: "pb", Result: OK, Finding: "b is there"},
		{Name: "c", Purpose: "pc", Result: Warn, Finding: "half of c", Fix: "mend c better"},
		{Name: "d", Purpose: "pd", Result: Unknown},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestBrokenChecksAreUnknown(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	got := run(t.Context(), []Check{
		{Name: "panics", Probe: func(context.Context) Finding { panic("oh") }},
		{Name: "hangs", Probe: func(context.Context) Finding { <-release; return Finding{Result: OK} }},
		{Name: "works", Probe: found(Finding{Result: OK})},
	}, 50*time.Millisecond)
	if got[0].Result != Unknown || !strings.Contains(got[0].Finding, "oh") {
		t.Errorf("a check that panics: %+v", got[0])
	}
	if got[1].Result != Unknown || !strings.Contains(got[1].Finding, "did not end") {
		t.Errorf("a check that hangs: %+v", got[1])
	}
	if got[2].Result != OK {
		t.Errorf("a check beside them: %+v", got[2])
	}
}

func TestProbeSeesTheEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	got := Run(ctx, []Check{{Probe: func(ctx context.Context) Finding { <-ctx.Done(); return Found(Fail, "seen") }}})
	// Both are right: what the probe said, if it said it in time, and that it was cut off.
	if r := got[0].Result; r != Fail && r != Unknown {
		t.Errorf("result %v", r)
	}
}
