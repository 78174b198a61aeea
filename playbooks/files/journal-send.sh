#!/bin/sh
# journal-send.sh USER FOLDER ARCHIVE: the files of FOLDER that standard input names, in an archive of root's. USER opens them, so a
# link that the service made there leads to nothing of root's.
set -eu
umask 077
status=0
runuser -u "$1" -- tar --create --gzip --directory "$2" --verbatim-files-from --files-from=- > "$3" || status=$?
[ "$status" -le 1 ]  # 1: a file grew while it was read, and is sent again by the next run
