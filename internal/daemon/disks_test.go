package daemon

import (
	"testing"

	"banger/internal/config"
	"banger/internal/daemon/dmsnap"
	"banger/internal/daemon/rootdisk"
)

// Every driver can be asked for in config.toml by the name that it has.
func TestConfigKnowsTheDisks(t *testing.T) {
	names := []string{rootdisk.Auto}
	for _, c := range append(rootdisk.UserMode(), rootdisk.RawOnly(rootdisk.Candidate{Disk: dmsnap.New("c0ffee")})...) {
		names = append(names, c.Disk.Name())
	}
	for _, name := range names {
		c, err := config.Parse("config.toml", []byte(`disk_driver = "`+name+`"`), config.Host{})
		if err != nil || c.DiskDriver != name {
			t.Errorf("%s: %q, %v", name, c.DiskDriver, err)
		}
	}
}
