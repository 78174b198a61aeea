#!/bin/sh
# engine-socket-access.sh SOCKET…: mode and owner of the engines' folder and of each socket; nothing without engines.
[ $# = 0 ] || stat --format="%a %U:%G" /run/llm-engine "$@"
