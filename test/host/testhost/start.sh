# Runs in the test host as its only job; the runner shares this file in as /host/job/start.
# What a run needs is copied to memory, because files over 9p are slow to execute.
set -u
. /host/job/settings
[ "$TESTHOST_PORT" = /dev/hvc0 ] || udevadm wait --timeout=30 "$TESTHOST_PORT"
exec <>"$TESTHOST_PORT" >&0 2>&1 # the port lets itself be opened once
[ "$TESTHOST_PORT" != /dev/hvc0 ] || stty $TESTHOST_SIZE

# It takes seconds, and the copying waits for the other side most of the time.
modprobe -a kvm_amd loop dm_snapshot tun bridge &
share() { # NAME OPTIONS
  mkdir -p "/host/$1"
  mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$2" "$1" "/host/$1"
}
share tree ro,cache=loose
share cache ro,cache=loose
share results rw,cache=none
cp -a /host/job/firecracker /host/job/tests /host/
mkdir /host/bin
find /host/tree/bin -maxdepth 1 -type f ! -name testhost -exec cp -t /host/bin {} +
# What looks for the programs in the tree finds those in memory.
[ ! -d /host/tree/bin ] || mount --bind /host/bin /host/tree/bin
mkdir -p -m 1777 /var/lib/tmp
wait $! || echo "testhost: a module does not load" >&2

# The host hangs when its kernel writes to code of its own that another processor runs:
# QEMU 7.2 can go on executing the breakpoint that the kernel puts there for the time
# being. KVM has the scheduler's code written when the first VM is made and when the last
# goes, and that of its APICs with every processor; a group with a bound on its CPU does too.
# So there is always one of each: a VM that never runs.
perl <<'END' &
open(my $kvm, "+<", "/dev/kvm") or die "/dev/kvm: $!";
my $id = ioctl($kvm, 0xAE01, 0) or die "KVM_CREATE_VM: $!";
open(my $vm, "+<&=", $id + 0) or die $!;
ioctl($vm, 0xAE60, 0) or die "KVM_CREATE_IRQCHIP: $!";
$id = ioctl($vm, 0xAE41, 0) or die "KVM_CREATE_VCPU: $!";
open(my $cpu, "+<&=", $id + 0) or die $!;
my $sregs = "\0" x 312;
ioctl($cpu, 0x8138AE83, $sregs) or die "KVM_GET_SREGS: $!";
substr($sregs, 272, 8) = pack("Q", unpack("Q", substr($sregs, 272, 8)) & ~0x800); # its APIC is off
ioctl($cpu, 0x4138AE84, $sregs) or die "KVM_SET_SREGS: $!";
sleep;
END
echo +cpu >/sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/bounded
echo "100000 100000" >/sys/fs/cgroup/bounded/cpu.max

export HOME=/root USER=root LANG=C.UTF-8 TERM="$TESTHOST_TERM"
export PATH=/host/bin:/host/firecracker:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export BANGER_TEST_HOST=1 BANGER_TEST_BOOT="$TESTHOST_BOOT" BANGER_TEST_REBOOT="$TESTHOST_REBOOT" BANGER_TEST_REQUIRE=testhost,root
export BANGER_TEST_CACHE=/host/cache BANGER_FIRECRACKER_DIR=/host/firecracker TMPDIR=/var/lib/tmp
read -r up _ </proc/uptime
echo "job started $up s after the kernel" >/host/results/started
printf '%s started\n' "$TESTHOST_MARK"
cd /host/tree
case $TESTHOST_PORT in
/dev/hvc0) setsid -c bash /host/job/command ;;
*) bash /host/job/command </dev/null ;;
esac
status=$?
# The end of the shell's session has hung the terminal up.
[ "$TESTHOST_PORT" != /dev/hvc0 ] || exec <>"$TESTHOST_PORT" >&0 2>&1
[ $status = 0 ] || journalctl -b -o short-monotonic >/host/results/journal 2>&1
[ "$TESTHOST_END" != orderly ] || sync
printf '%s exit %d\n' "$TESTHOST_MARK" "$status"
# A power cut is the runner's: it kills QEMU as soon as it has read the mark.
[ "$TESTHOST_END" != orderly ] || systemctl poweroff
sleep infinity
