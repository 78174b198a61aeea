#!/bin/sh
# enabled-units.sh UNIT…: whether each is enabled, a line each; nothing where there is no unit.
[ $# = 0 ] || systemctl is-enabled "$@"
