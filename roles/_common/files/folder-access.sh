#!/bin/sh
# folder-access.sh FOLDER TEST…: mode and owner of a folder, then the path of each file in it for which find's TEST holds.
stat --format='%a %U:%G' "$1" && find "$@"
