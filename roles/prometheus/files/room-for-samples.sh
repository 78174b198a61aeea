#!/bin/sh
# room-for-samples.sh BYTES: `fits` if the samples' file system has room for BYTES. Prometheus removes the oldest block only once a newer one
# is written, and its makers advise to give it at most 85 % of a file system.
size=$(df --block-size=1 --output=size /var/lib/prometheus/metrics2 | tail -n 1)
room=$((size * 85 / 100))
if [ "$1" -le "$room" ]; then echo fits; else echo "room for $((room >> 20)) MB, 85 % of the file system"; fi
