#!/bin/sh
# One container's life, in a mount namespace of its own: its root is put together and booted, and booted again whenever it
# reboots from inside. usage: container.sh CGROUP OVERLAY-OPTIONS ROOT CABLE MAC BRIDGE SYSTEMD-NSPAWN [ARGUMENT...]
set -eu
group=$1 overlay=$2 root=$3 cable=$4 mac=$5 bridge=$6
shift 6

echo $$ > "$group/supervisor/cgroup.procs"
mount -t overlay overlay -o "$overlay" "$root"
# The network namespace's own sysfs: the machine's would show its interfaces. Control groups stay where they are.
mkdir -p cgroup
mount --rbind /sys/fs/cgroup cgroup
mount -t sysfs -o ro sysfs /sys
mount --rbind cgroup /sys/fs/cgroup
umount -l cgroup

# What systemd-nspawn notes of a running container goes with this namespace, however the container ends.
mkdir -p /run/systemd
mount -t tmpfs -o mode=755 tmpfs /run/systemd

# The host's own units mount its /tmp, with the options that it has there.
export SYSTEMD_NSPAWN_TMPFS_TMP=0

# systemd-nspawn ends with 133 where the container wants to be started again.
code=133
while [ $code = 133 ]; do
    # Both ends of a cable are gone if its container ended before it gave its end back.
    if ! ip link show "c$cable" > /dev/null 2>&1; then
        ip link delete "$cable" 2> /dev/null || :
        ip link add "$cable" type veth peer name "c$cable" address "$mac"
        ip link set "$cable" master "$bridge" up
    fi
    code=0
    sh -c 'echo $$ > "$0/host/cgroup.procs" && exec "$@"' "$group" "$@" || code=$?
    echo "container.sh: systemd-nspawn ended with $code"
done
exit $code
