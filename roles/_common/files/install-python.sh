#!/bin/sh
# Install Python from the mirror on a bare Debian: ROOT and KEYRING are files in base64, MIRROR_NAME, MIRROR_ADDRESS and MIRROR_URL say where it is.
# It is appended to complete-dpkg.sh, whose functions it uses.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
umask 022
mkdir -p /etc/llmkeep/pki /etc/apt/keyrings /run/llmkeep/apt
echo "$ROOT" | base64 -d > /etc/llmkeep/pki/root.pem.new
mv -f /etc/llmkeep/pki/root.pem.new /etc/llmkeep/pki/root.pem
echo "$KEYRING" | base64 -d > /etc/apt/keyrings/llmkeep.pgp.new
mv -f /etc/apt/keyrings/llmkeep.pgp.new /etc/apt/keyrings/llmkeep.pgp
grep -qF " $MIRROR_NAME" /etc/hosts || echo "$MIRROR_ADDRESS $MIRROR_NAME" >> /etc/hosts
cat > /run/llmkeep/apt/mirror.sources << END
Types: deb
URIs: $MIRROR_URL/apt
Suites: trixie
Components: main
Signed-By: /etc/apt/keyrings/llmkeep.pgp
END
sources='-o Dir::Etc::sourcelist=/run/llmkeep/apt/mirror.sources -o Dir::Etc::sourceparts=/dev/null
  -o Acquire::https::CAInfo=/etc/llmkeep/pki/root.pem -o Acquire::EnableSrvRecords=false'
# shellcheck disable=SC2086,SC3044 # several words; the function is defined in complete-dpkg.sh
complete $sources
get() {
  # shellcheck disable=SC2086 # several words
  apt-get -qq $sources -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" < /dev/null
}
get update
get install -y --no-install-recommends python3 python3-apt
