package daemon

import (
	"fmt"
	"testing"

	"banger/internal/config"
	"banger/internal/netpolicy"
)

// TestPresets: config.toml takes the presets that there are, and the default is one.
func TestPresets(t *testing.T) {
	for _, want := range []netpolicy.Preset{netpolicy.None, netpolicy.Internet, netpolicy.LAN, netpolicy.Host} {
		c, err := config.Parse("config.toml", fmt.Appendf(nil, "network = %q\n", want), config.Host{CPUs: 1, Memory: 1 << 30})
		if err != nil || c.Network != string(want) {
			t.Errorf("%s: %q, %v", want, c.Network, err)
		}
	}
	if p, err := netpolicy.ParsePreset(config.Default(config.Host{}).Network); err != nil || p != netpolicy.Internet {
		t.Errorf("the default: %s, %v", p, err)
	}
}
