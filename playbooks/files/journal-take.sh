#!/bin/sh
# journal-take.sh USER FOLDER ARCHIVE BYTES: unpack what journal-send.sh packed, as USER, for USER alone. More than BYTES is cut off, which tar finds.
set -eu
umask 077
# shellcheck disable=SC2016  # the inner shell's own words
runuser -u "$1" -- sh -c 'gzip --decompress | head -c "$2" | tar --extract --directory "$1" --no-same-owner --no-same-permissions --unlink-first' \
  take "$2" "$4" < "$3" && exit
echo "it is no whole archive, or has more than $4 bytes: look at the serving host that packed it" >&2
exit 2
