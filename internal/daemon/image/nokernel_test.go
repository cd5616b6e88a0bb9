package image

import (
	"testing"

	"banger/api"
)

// TestImageWithoutAKernel: an image that names no kernel, or one that there is none of,
// is said so in words; nothing is made.
func TestImageWithoutAKernel(t *testing.T) {
	b := newCounting(nil)
	w := newWorld(t, b)
	for name, want := range map[string]struct {
		code api.Code
		text string
	}{
		"":       {api.Refused, "the image has no kernel"},
		"nobody": {api.NotFound, "there is no kernel named nobody"},
	} {
		_, err := w.EnsureKernel(t.Context(), name, quiet{})
		if api.CodeOf(err) != want.code || err.Error() != want.text || api.HintOf(err) != "banger kernel ls" {
			t.Errorf("%q: %v", name, err)
		}
	}
	if kernels, err := w.ListKernels(t.Context()); err != nil || len(kernels) != 1 || !kernels[0].Available {
		t.Errorf("kernels: %v, %v", kernels, err)
	}
}
