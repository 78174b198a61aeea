#!/bin/sh
# record-heads.sh RECORD KEPT SEEN SEEN_FOLDER [VOLUME]: what a witness asks of the record in folder RECORD, of whose heads it has KEPT bytes.
# After a line `record`, since a login shell may print something before, one line each: who signs, a hash of as much as the witness has, what
# comes after that (at most 192 KiB a time), the tip: the head that was to be signed last. More at a time would be lost: ansible-runner drops
# a result of 700,000 characters or more, and raw's output is in it twice.
# SEEN, in base64, is what the last look saw: it is left in SEEN_FOLDER, for the writer to compare before it signs.
# Where VOLUME, a mount unit, is there and not mounted, as while a host boots, nothing can be said of the record: `shut`.
echo record
record=$1 kept=$2 seen=$3 left=$4 volume=$5
umask 022
if test -n "$seen" && test "$(base64 -w 0 "$left/head" 2> /dev/null)" != "$seen"; then
  mkdir -p "$left" && echo "$seen" | base64 -d > "$left/.head.new" && sync "$left/.head.new" && mv "$left/.head.new" "$left/head"
fi
if test -n "$volume" && systemctl cat "$volume" > /dev/null 2>&1 && ! systemctl is-active --quiet "$volume"; then
  echo shut
  exit 0
fi
cd "$record" 2> /dev/null || cd /
head -n 1 verifier 2> /dev/null || echo none
head -c "$kept" heads 2> /dev/null | split --bytes=4M --filter=sha256sum | sha256sum | cut -c 1-64
tail -c "+$((kept + 1))" heads 2> /dev/null | head -c 196608 | base64 -w 0
echo
head -c 1024 tip 2> /dev/null | base64 -w 0
