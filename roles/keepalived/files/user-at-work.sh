#!/bin/sh
# user-at-work.sh USER: wait until a process of USER runs.
until pgrep --euid "$1" > /dev/null; do sleep 0.02; done
