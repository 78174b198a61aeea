#!/bin/sh
# release-signatures.sh FOLDER: exit 1 at the first release that the publish key did not sign.
for release in "$1"/*/; do
  [ -d "$release" ] || continue
  sqv --keyring /etc/llmkeep/publish/keyring.pgp --signature-file "$release/MANIFEST.json.sig" "$release/MANIFEST.json" > /dev/null ||
    { echo "$release is not signed by the publish key"; exit 1; }
done
