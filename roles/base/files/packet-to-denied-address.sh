#!/bin/bash
# A UDP packet to an allowed address, exit 3 where it does not leave; then one to a denied address, whose exit status is this program's.
echo > /dev/udp/127.0.0.2/9 || exit 3
echo > /dev/udp/127.0.0.1/9
