package main

import (
	"math"
	"slices"
)

// quantile interpolates between the two nearest samples; q is 0 to 1.
func quantile(samples []float64, q float64) float64 {
	if len(samples) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(samples))
	at := q * float64(len(s)-1)
	low := int(at)
	if low+1 >= len(s) {
		return s[len(s)-1]
	}
	return s[low] + (at-float64(low))*(s[low+1]-s[low])
}

func median(samples []float64) float64 { return quantile(samples, 0.5) }

// interval holds the median of what was sampled with a probability of at least 95 %,
// whatever the distribution: the k-th smallest and the k-th largest sample, with the
// largest k for which it does. Below six samples none does, and it is their range.
func interval(samples []float64) (low, high float64) {
	n := len(samples)
	if n == 0 {
		return math.NaN(), math.NaN()
	}
	s := slices.Sorted(slices.Values(samples))
	// below is the probability that fewer than k samples lie under the median: each of
	// them does with probability one half.
	k, below, term := 0, 0.0, math.Pow(0.5, float64(n))
	for k < n/2 && below+term <= 0.025 {
		below += term
		term *= float64(n-k) / float64(k+1)
		k++
	}
	k = max(k, 1)
	return s[k-1], s[n-k]
}

// The verdicts on a target.
const (
	met       = "met"
	missed    = "MISSED"
	undecided = "undecided (noise)"
)

// judge says whether the median of what was sampled is at most limit. It is undecided
// when the interval of the median has the limit inside.
func judge(samples []float64, limit float64) string {
	low, high := interval(samples)
	switch {
	case high <= limit:
		return met
	case low > limit:
		return missed
	}
	return undecided
}

// pairs applies f to the samples of each round.
func pairs(a, b []float64, f func(a, b float64) float64) []float64 {
	out := make([]float64, min(len(a), len(b)))
	for i := range out {
		out[i] = f(a[i], b[i])
	}
	return out
}

func minus(a, b float64) float64 { return a - b }
func plus(a, b float64) float64  { return a + b }
func ratio(a, b float64) float64 { return a / b }
