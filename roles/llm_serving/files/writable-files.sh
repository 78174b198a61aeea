#!/bin/sh
# writable-files.sh FOLDER: the files in FOLDER that have a write permission; none if FOLDER does not exist.
[ ! -d "$1" ] || find "$1" -type f -perm /222
