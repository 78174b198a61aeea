#!/bin/sh
# enabled-units.sh UNIT…: whether each is enabled, one line per unit; nothing without units.
[ $# = 0 ] || systemctl is-enabled "$@"
