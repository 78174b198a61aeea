#!/bin/sh
# journal-take.sh USER FOLDER ARCHIVE: unpack what journal-send.sh packed, as USER, for USER alone.
set -eu
umask 077
runuser -u "$1" -- tar --extract --gzip --directory "$2" --no-same-owner --no-same-permissions --unlink-first < "$3"
