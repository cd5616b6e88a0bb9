package vm

import (
	"strings"
	"testing"

	"banger/api"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/fcproc"
	"banger/internal/daemon/store"
)

// debianModules are those of a kernel as kernel pull makes it, in the order of loading.
func debianModules() []string {
	return strings.Fields(`virtio_ring.ko virtio.ko virtio_mmio.ko virtio_blk.ko virtio_console.ko virtio-rng.ko
		failover.ko net_failover.ko virtio_net.ko vsock.ko vmw_vsock_virtio_transport_common.ko vmw_vsock_virtio_transport.ko.xz`)
}

// An initramfs brings the modules of one channel, in the kernel's order.
func TestBootModules(t *testing.T) {
	common := "virtio_ring.ko virtio.ko virtio_mmio.ko virtio_blk.ko "
	for vsock, want := range map[bool]string{
		false: common + "virtio_console.ko virtio-rng.ko failover.ko net_failover.ko virtio_net.ko",
		true: common + "virtio-rng.ko failover.ko net_failover.ko virtio_net.ko " +
			"vsock.ko vmw_vsock_virtio_transport_common.ko vmw_vsock_virtio_transport.ko.xz",
	} {
		m := &Manager{ability: driver.Ability{Vsock: vsock}}
		k := store.Kernel{Modules: debianModules()}
		if got := strings.Join(m.bootModules(k), " "); got != want {
			t.Errorf("vsock %v:\n got %s\nwant %s", vsock, got, want)
		}
		if got := strings.Join(k.Modules, " "); got != strings.Join(debianModules(), " ") {
			t.Errorf("vsock %v: the kernel's own list became %s", vsock, got)
		}
	}
}

func TestMissingChannel(t *testing.T) {
	m := &Manager{ability: driver.Ability{Vsock: true}, host: driver.Host{VMM: fcproc.New()}}
	whole := store.Kernel{Name: "debian-cloud", Modules: debianModules()}
	if err := m.missingChannel(whole); err != nil {
		t.Error(err)
	}
	old := store.Kernel{Name: "debian-cloud", Modules: debianModules()[:9]}
	err := m.missingChannel(old)
	const want = "kernel debian-cloud is an earlier release's and has no vsock, over which firecracker reaches the guest"
	if api.CodeOf(err) != api.Refused || err.Error() != want || api.HintOf(err) != "banger kernel pull debian-cloud" {
		t.Errorf("%v: %v, hint %q", api.CodeOf(err), err, api.HintOf(err))
	}
	m.ability.Vsock = false
	if err := m.missingChannel(old); err != nil {
		t.Errorf("where nothing needs it: %v", err)
	}
}
