#!/bin/sh
# room-for-samples.sh BYTES: `fits` where the samples' file system takes so many. Prometheus removes the oldest block once a newer one is
# written, and advises to give it 85 % of a file system at most.
size=$(df --block-size=1 --output=size /var/lib/prometheus/metrics2 | tail -n 1)
room=$((size * 85 / 100))
if [ "$1" -le "$room" ]; then echo fits; else echo "room for $((room >> 20)) MB, 85 % of the file system"; fi
