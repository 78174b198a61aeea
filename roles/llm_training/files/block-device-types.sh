#!/bin/sh
# block-device-types.sh FOLDER: the types of block device under it, or under the nearest folder above it that exists.
folder=$1
while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
device=$(findmnt --noheadings --nofsroot --output SOURCE --target "$folder" | tail -n 1)
lsblk --inverse --noheadings --output TYPE "$device" 2> /dev/null | sort --unique | paste --serial --delimiters ' ' | grep . || echo "$device"
