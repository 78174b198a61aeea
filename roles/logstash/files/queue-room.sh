#!/bin/sh
# queue-room.sh FOLDER: MiB that FOLDER may use: the free space of its file system and what it uses already.
set -eu
place=$1
while [ ! -e "$place" ]; do place=$(dirname "$place"); done
free=$(df --output=avail --block-size=1M "$place" | tail --lines=1)
used=$(du --summarize --block-size=1M "$1" 2> /dev/null | cut --fields=1)
echo $((free + ${used:-0}))
