#!/bin/sh
# block-device-types.sh FOLDER: the types of the block devices under it, or under its nearest existing parent.
folder=$1
while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
device=$(findmnt --noheadings --nofsroot --output SOURCE --target "$folder" | tail -n 1)
lsblk --inverse --noheadings --output TYPE "$device" 2> /dev/null | sort --unique | paste --serial --delimiters ' ' | grep . || echo "$device"
