#!/bin/sh
# folder-signatures.sh PLACE FILE KEYRING TYPE: exit 1 at the first folder in PLACE whose FILE is not signed as TYPE by a key of KEYRING.
for folder in "$1"/*/; do
  [ -d "$folder" ] || continue
  sqv --keyring "$3" --signature-file "$folder$2.sig" "$folder$2" > /dev/null || { echo "$folder$2 is not signed by a key of $3"; exit 1; }
  # Each field of the document is on its own line.
  grep -qx " \"type\": \"$4\"," "$folder$2" || { echo "$folder$2 is not signed as $4"; exit 1; }
done
