#!/bin/sh
# enter.sh LOWER UPPER WORK ROOT STAGED COMMAND…: runs COMMAND in the root file system LOWER, of which what it writes lands in UPPER.
# LOWER is one folder, or several from top to bottom with colons between them. STAGED is seen at /mnt, and cannot be written.
# For `unshare --mount --net`: mounts end with the process, and there is no network in it.
set -eu
lower=$1 upper=$2 work=$3 root=$4 staged=$5
shift 5
mount -t overlay -o "lowerdir=$lower,upperdir=$upper,workdir=$work" overlay "$root"
mount --bind -o ro "$staged" "$root/mnt"
mount -t tmpfs tmpfs "$root/tmp"
exec chroot "$root" "$@"
