package wire

import (
	"strings"
	"testing"
)

func TestCleanText(t *testing.T) {
	for _, c := range []struct {
		name, text, want string
		limit            int
	}{
		{"plain", "git: no such path – «é»\n\tin HEAD\n", "git: no such path – «é»\n\tin HEAD\n", 100},
		{"escapes", "\x1b[31mred\x1b]0;title\x07\r\x00\x7f!", "[31mred]0;title!", 100},
		{"C1", "a\u009b5m\u0085b\u00a0c", "a5mb\u00a0c", 100},
		{"no UTF-8", "a\xff\x9bb", "a?b", 100},
		{"overrides", "a\u202eb\u202ac\u2066d\u2069e", "abcde", 100},
		{"their neighbours", "\u2029\u202f\u2065\u206a", "\u2029\u202f\u2065\u206a", 100},
		{"too long", "aéé", "aé", 4},
		{"just so", "aé", "aé", 3},
		{"nothing", "", "", 0},
	} {
		if got := CleanText(c.text, c.limit); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	// What is dropped takes no room.
	if got := CleanText(strings.Repeat("\x1b", 10)+"ab", 2); got != "ab" {
		t.Errorf("%q", got)
	}
}
