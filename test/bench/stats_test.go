package main

import "testing"

func sequence(n int) []float64 {
	s := make([]float64, n)
	for i := range s {
		s[n-1-i] = float64(i + 1) // not sorted
	}
	return s
}

func TestQuantile(t *testing.T) {
	for _, c := range []struct {
		n       int
		q, want float64
	}{{1, 0.5, 1}, {2, 0.5, 1.5}, {5, 0.25, 2}, {5, 1, 5}, {4, 0.5, 2.5}, {20, 0, 1}} {
		if got := quantile(sequence(c.n), c.q); got != c.want {
			t.Errorf("quantile %v of 1..%d: %v, not %v", c.q, c.n, got, c.want)
		}
	}
}

// TestInterval holds the ranks against the usual table for the sign test (two sided,
// 5 %).
func TestInterval(t *testing.T) {
	for n, k := range map[int]int{1: 1, 3: 1, 5: 1, 6: 1, 8: 1, 9: 2, 12: 3, 20: 6, 25: 8, 50: 18, 100: 40} {
		low, high := interval(sequence(n))
		if low != float64(k) || high != float64(n+1-k) {
			t.Errorf("n = %d: %v to %v, not %d to %d", n, low, high, k, n+1-k)
		}
	}
}

func TestJudge(t *testing.T) {
	for limit, want := range map[float64]string{25: met, 15: met, 14.9: undecided, 6: undecided, 5.9: missed, 0: missed} {
		if got := judge(sequence(20), limit); got != want {
			t.Errorf("at most %v of 1..20: %s, not %s", limit, got, want)
		}
	}
	if got := judge([]float64{3}, 3); got != met {
		t.Errorf("one sample at the limit: %s", got)
	}
}

func TestAtLeast(t *testing.T) {
	for _, c := range []struct {
		limit float64
		want  string
	}{{1.5, met}, {2, met}, {2.1, undecided}, {3, undecided}, {3.1, missed}} {
		if got := (row{samples: []float64{2, 3, 2.5}}).atLeast(c.limit, "").verdict; got != c.want {
			t.Errorf("2, 3 and 2.5 against at least %v: %s, want %s", c.limit, got, c.want)
		}
	}
}
