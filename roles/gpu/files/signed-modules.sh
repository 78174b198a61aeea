#!/bin/sh
# signed-modules.sh PROGRAM CERTIFICATE: verify the modules that dkms installed for the kernel that boots next.
kernel=$(cat /var/lib/llmkeep/gpu/kernel) || exit 1
# shellcheck disable=SC2046 # names of modules have no spaces
exec python3 -c "$1" "$2" $(find "/lib/modules/$kernel/updates" -name '*.ko*')
