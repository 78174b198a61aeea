#!/bin/sh
# writable-files.sh FOLDER: the files in it that have a write permission; none where there is no such folder.
[ ! -d "$1" ] || find "$1" -type f -perm /222
