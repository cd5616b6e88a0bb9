package config

import (
	"fmt"
	"math"
	"math/rand/v2"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"

	"banger/api"
)

var sizeForm = regexp.MustCompile(`^[0-9]+(\.[0-9]+)? ?[KMGTPkmgtp]([iI]?[bB])?$`)

// ParseSize reads a size as people write it: "512M", "4G", "1.5GiB". Units are
// binary, whether written with an i or not. A number without a unit is refused,
// because half the tools take it for bytes and half for megabytes. The error is
// api.Invalid.
func ParseSize(s string) (int64, error) {
	if !sizeForm.MatchString(s) {
		if _, err := strconv.ParseFloat(s, 64); err == nil {
			return 0, api.Errorf(api.Invalid, "size %q lacks a unit: write for example 512M or 4G", s)
		}
		return 0, api.Errorf(api.Invalid, "%q is no size: write for example 512M or 4G", s)
	}
	n, err := units.RAMInBytes(s)
	// The conversion of a float that is too large gives the smallest int64.
	if err != nil || n < 0 || n > math.MaxInt64/2 {
		return 0, api.Errorf(api.Invalid, "%q is no size: it is too large", s)
	}
	return n, nil
}

// FormatSize writes a size as ParseSize reads it, in the largest unit that fits,
// with at most one decimal: "512M", "1.5G". A size that would be rounded so, but is
// a whole number of the next smaller unit, is written in that: "1025M". Below 1 KiB
// it writes bytes, "17B", for people only.
func FormatSize(n int64) string {
	if n < 0 {
		return "-" + FormatSize(-max(n, -math.MaxInt64))
	}
	if n < 1<<10 {
		return strconv.FormatInt(n, 10) + "B"
	}
	const unit = "KMGTPE"
	i, scale := 0, int64(1<<10)
	for i < len(unit)-1 && n/scale >= 1<<10 {
		i, scale = i+1, scale<<10
	}
	if i > 0 && n%(scale>>10) == 0 && n/(scale>>10)*10%(1<<10) != 0 {
		i, scale = i-1, scale>>10
	}
	if n%scale == 0 {
		return strconv.FormatInt(n/scale, 10) + unit[i:i+1]
	}
	return strconv.FormatFloat(math.Round(float64(n)/float64(scale)*10)/10, 'f', -1, 64) + unit[i:i+1]
}

// ParseDuration reads "30s", "10m", "2h", "1h30m". A negative one, and a number
// without a unit, is refused with api.Invalid; "0" is no time at all.
func ParseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		if _, nerr := strconv.ParseFloat(s, 64); nerr == nil {
			return 0, api.Errorf(api.Invalid, "time %q lacks a unit: write for example 30s or 10m", s)
		}
		return 0, api.Errorf(api.Invalid, "%q is no time: write for example 30s, 10m or 2h", s)
	}
	if d < 0 {
		return 0, api.Errorf(api.Invalid, "time %q is negative", s)
	}
	return d, nil
}

// maxName is the length of a DNS label in bytes, RFC 1123.
const maxName = 63

var label = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

// ValidateName checks the name of a VM: a DNS label (RFC 1123) in lower case, and
// not "localhost", because it becomes the guest's host name. The error is api.Invalid.
func ValidateName(name string) error {
	switch {
	case name == "":
		return api.Errorf(api.Invalid, "a name must not be empty")
	case len(name) > maxName:
		return api.Errorf(api.Invalid, "name %.20q… is too long: at most %d characters", name, maxName)
	case !label.MatchString(name):
		return api.Errorf(api.Invalid, "%q is no name: use lower-case letters, digits and hyphens, with a letter or digit at both ends", name)
	case name == "localhost":
		return api.Errorf(api.Invalid, "a VM cannot be called localhost")
	}
	return nil
}

// NameFrom makes a valid name of any text, such as a folder's name: what cannot be
// in a DNS label becomes a hyphen. It is "vm" when nothing is left.
func NameFrom(text string) string {
	var b strings.Builder
	for _, r := range strings.ToLower(text) {
		switch {
		case r >= 'a' && r <= 'z' || r >= '0' && r <= '9':
			b.WriteRune(r)
		case b.Len() > 0 && !strings.HasSuffix(b.String(), "-"):
			b.WriteByte('-')
		}
		if b.Len() == maxName {
			break
		}
	}
	name := strings.TrimRight(b.String(), "-")
	if ValidateName(name) != nil {
		return "vm"
	}
	return name
}

// Numbered is the nth name like base: base, base-2, base-3 …, cut so that it
// stays valid.
func Numbered(base string, n int) string {
	if n <= 1 {
		return base
	}
	suffix := fmt.Sprintf("-%d", n)
	if len(base)+len(suffix) > maxName {
		base = strings.TrimRight(base[:maxName-len(suffix)], "-")
	}
	return base + suffix
}

// RandomName makes a name of an adjective and a noun. It may be taken.
func RandomName() string { return randomName(rand.IntN) }

// randomName draws with intN, which returns a number below its argument.
func randomName(intN func(int) int) string {
	a, n := strings.Fields(adjectives), strings.Fields(nouns)
	return a[intN(len(a))] + "-" + n[intN(len(n))]
}

const adjectives = `
	able agile amber ample apt bold brave breezy bright brisk calm candid cheery clear clever
	cosy crisp daring deft eager early fair fancy fleet fond frank fresh gentle glad golden
	grand handy happy hardy honest jolly keen kind lively loyal lucid lucky mellow merry mild
	neat nimble noble patient plucky polite prime proud quick quiet rapid ready robust rosy sharp
	shiny silver smart snug solid sound spry steady sunny swift tidy trusty upbeat vivid warm
	wise witty young zesty`

const nouns = `
	acorn alder anchor arbor aspen badger barley basil beacon beaver birch bison brook canyon
	cedar clover comet coral crane cricket dahlia delta dune ember falcon fern finch fjord fox
	garnet geyser glade harbor hazel heron ibis iris island ivy juniper kestrel lagoon lantern
	larch lark lemur lily lotus lynx maple marten meadow mesa moss newt oak opal orchid osprey
	otter owl panda pebble pine plover poplar quail quartz raven reef robin rowan saffron sage
	sparrow spruce swan thistle tulip walnut willow wren`
