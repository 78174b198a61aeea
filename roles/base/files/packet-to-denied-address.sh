#!/bin/bash
# Sends a UDP packet to an allowed address (exit 3 if that fails), then one to a denied address, whose result is the exit status.
echo > /dev/udp/127.0.0.2/9 || exit 3
echo > /dev/udp/127.0.0.1/9
