package main

import (
	"fmt"
	"io"
	"math"
	"strings"
	"text/tabwriter"
)

// row is one line of the report: what was measured, and a target if there is one.
type row struct {
	what    string
	unit    string // "ms", "s", "MiB", "MiB/s", "%", "×"
	samples []float64
	cpu     []float64 // CPU seconds of each sample; nil when not measured
	target  string    // in words, empty for a line that only informs
	verdict string
}

// against judges a row by the rule of the report: see rule.
func (r row) against(limit float64, target string) row {
	r.target, r.verdict = target, judge(r.samples, limit)
	return r
}

// atLeast is against for what must not be less than limit.
func (r row) atLeast(limit float64, target string) row {
	var below []float64
	for _, s := range r.samples {
		below = append(below, -s)
	}
	r.target, r.verdict = target, judge(below, -limit)
	return r
}

// rule is printed below the tables.
const rule = `quartiles: half of the samples lie there. CPU: median of the CPU seconds per sample.
A target is met when the 95 % interval of the median (by ranks, the sign test's; the
range below six samples) lies on the good side of it or at it, MISSED when it lies on the other, and
undecided when the target lies inside. A target on one figure is compared with that.`

// part is one table of the report.
type part struct {
	title string
	notes []string
	rows  []row
}

func (p *part) add(rows ...row) { p.rows = append(p.rows, rows...) }

func (p *part) note(format string, args ...any) {
	p.notes = append(p.notes, fmt.Sprintf(format, args...))
}

func (p *part) print(w io.Writer) {
	fmt.Fprintf(w, "\n== %s\n", p.title)
	for _, n := range p.notes {
		fmt.Fprintf(w, "   %s\n", n)
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "WHAT\tN\tMEDIAN\tQUARTILES\tMIN–MAX\tCPU\tTARGET\tVERDICT")
	for _, r := range p.rows {
		cpu := "-"
		if len(r.cpu) > 0 {
			cpu = fmt.Sprintf("%.3f s", median(r.cpu))
		}
		s := r.samples
		fmt.Fprintf(t, "%s\t%d\t%s %s\t%s–%s\t%s–%s\t%s\t%s\t%s\n", r.what, len(s), figure(median(s)), r.unit,
			figure(quantile(s, 0.25)), figure(quantile(s, 0.75)), figure(quantile(s, 0)), figure(quantile(s, 1)),
			cpu, orDash(r.target), orDash(r.verdict))
	}
	t.Flush()
}

// figure prints three significant digits or more, and whole numbers as they are.
func figure(v float64) string {
	switch a := max(v, -v); {
	case a >= 100 || v == math.Trunc(v):
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// summary repeats the targets of all parts.
func summary(w io.Writer, parts []*part) {
	fmt.Fprintf(w, "\n== targets\n\n")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, p := range parts {
		for _, r := range p.rows {
			if r.target != "" {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s %s\n", r.verdict, strings.TrimSpace(r.what), r.target, figure(median(r.samples)), r.unit)
			}
		}
	}
	t.Flush()
	fmt.Fprintf(w, "\n%s\n", rule)
}
