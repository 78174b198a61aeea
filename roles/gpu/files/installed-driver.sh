#!/bin/sh
# installed-driver.sh NAME VERSION: what dkms says of the driver for the kernel that it was installed for.
exec dkms status -m "$1" -v "$2" -k "$(cat /var/lib/llmkeep/gpu/kernel)"
