#!/bin/bash
# Builds the disk, kernel and initrd of the test host into the directory $1, as root and
# without a mount or a loop device. The name of the cached result is a hash of this text:
# it is complete, and nothing else goes into the image.
set -euo pipefail
out=$1
root=$out/rootfs

packages=linux-image-amd64,initramfs-tools,kmod,udev,systemd,systemd-sysv,dbus,util-linux,mount
packages+=,procps,iproute2,nftables,dmsetup,e2fsprogs,xfsprogs,fdisk,git,strace,curl,jq,less

# The modules that are left out are drivers of hardware that QEMU does not have.
mmdebstrap --quiet --mode=root --variant=minbase --aptopt='Apt::Install-Recommends "false"' \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' \
  --dpkgopt='path-exclude=/lib/modules/*/kernel/sound/*' \
  --dpkgopt='path-exclude=/lib/modules/*/kernel/drivers/gpu/*' \
  --dpkgopt='path-exclude=/lib/modules/*/kernel/drivers/media/*' \
  --dpkgopt='path-exclude=/lib/modules/*/kernel/drivers/infiniband/*' \
  --dpkgopt='path-exclude=/lib/modules/*/kernel/drivers/net/wireless/*' \
  --dpkgopt='path-exclude=/lib/modules/*/kernel/drivers/net/ethernet/*' \
  --keyring=/usr/share/keyrings \
  --include="$packages" \
  --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
  --essential-hook='printf "MODULES=list\nCOMPRESS=cat\nBUSYBOX=auto\n" > "$1/etc/initramfs-tools/conf.d/testhost"' \
  --essential-hook='printf "virtio_pci\nvirtio_blk\next4\n" > "$1/etc/initramfs-tools/modules"' \
  bookworm "$root"

echo testhost > "$root/etc/hostname"
echo '127.0.0.1 localhost testhost' > "$root/etc/hosts"
# The same machine at each boot, because the root disk forgets.
echo 7e57405700000000000000000000ba49 > "$root/etc/machine-id"
# The second disk has the state: it alone outlives a run, if the run says so.
cat > "$root/etc/fstab" <<'END'
/dev/vda / ext4 rw,noatime 0 0
/dev/vdb /var/lib auto rw,noatime 0 0
END
mkdir -p "$root/host" "$root/usr/local/lib/testhost"
# Drivers that are loaded for a processor or a board that is only emulated, and cost seconds.
for module in aesni_intel ghash_clmulni_intel sha512_ssse3 sha256_ssse3 sha1_ssse3 crct10dif_pclmul \
  intel_rapl_common intel_rapl_msr iTCO_wdt lpc_ich i2c_i801 ahci psmouse pcspkr evdev serio_raw binfmt_misc; do
  echo "blacklist $module"
done > "$root/etc/modprobe.d/testhost.conf"

# What runs is in the share, so that the image need not be built anew to change it.
cat > "$root/usr/local/lib/testhost/start" <<'END'
#!/bin/sh
set -e
mount -t tmpfs -o mode=755 host /host
mkdir /host/job
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,ro job /host/job
exec /bin/sh /host/job/start
END
chmod 755 "$root/usr/local/lib/testhost/start"
cat > "$root/etc/systemd/system/testhost.service" <<'END'
[Unit]
Description=the job of the test host
FailureAction=poweroff-force
After=basic.target dbus.socket
[Service]
Type=exec
ExecStart=/usr/local/lib/testhost/start
TasksMax=infinity
LimitNOFILE=524288
StandardOutput=journal+console
[Install]
WantedBy=multi-user.target
END
chroot "$root" systemctl -q enable testhost.service
chroot "$root" systemctl -q mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer \
  e2scrub_reap.service fstrim.timer dpkg-db-backup.timer systemd-random-seed.service \
  systemd-journal-flush.service getty@tty1.service serial-getty@ttyS0.service getty-static.service \
  systemd-pcrphase.service systemd-pcrphase-sysinit.service systemd-pcrphase-initrd.service \
  systemd-update-utmp.service systemd-update-utmp-runlevel.service modprobe@efi_pstore.service \
  modprobe@drm.service modprobe@fuse.service sys-fs-fuse-connections.mount dev-hugepages.mount \
  dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount proc-sys-fs-binfmt_misc.automount \
  systemd-binfmt.service systemd-hwdb-update.service
chroot "$root" systemctl -q set-default multi-user.target
chroot "$root" passwd -q -d root
chroot "$root" dpkg-query -W -f='${Package} ${Version}\n' > "$out/packages"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/*

kernel=$(ls "$root/lib/modules")
mv "$root/boot/vmlinuz-$kernel" "$out/vmlinuz"
mv "$root/boot/initrd.img-$kernel" "$out/initrd"
truncate -s 6G "$out/disk"
mkfs.ext4 -q -F -E lazy_itable_init=1,lazy_journal_init=1 -d "$root" "$out/disk"
rm -rf "$root"
