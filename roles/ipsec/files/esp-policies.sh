#!/bin/sh
# esp-policies.sh PEER…: exit 1 at the first peer to which the kernel sends packets without ESP.
for peer; do
  ip xfrm policy list dir out dst "$peer" | grep -q 'proto esp .*mode transport' || { echo "packets to $peer need no ESP"; exit 1; }
done
