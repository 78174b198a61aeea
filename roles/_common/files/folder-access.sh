#!/bin/sh
# folder-access.sh FOLDER TEST…: mode and owner of a folder, followed by the path of each file in it that matches find's TEST.
stat --format='%a %U:%G' "$1" && find "$@"
