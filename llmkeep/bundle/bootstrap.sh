#!/bin/sh
# bootstrap [DOMAIN]: turns a bare Debian 13 machine into the estate's control node, from this bundle alone.
# DOMAIN is the estate's, base_domain in its inventory (default: estate.internal).
#
# Compare this file's sha256 with the one that `llmkeep bundle build` printed BEFORE you run it: it carries the
# fingerprint of the only key whose bundles it accepts. It needs root, and what each Debian 13 has: apt, sqv, sed, find.
#
# It works on a copy: copies the bundle, checks signature, expiry, serial, then every file; until then nothing of the
# bundle is run. Each step may be cut off by a power loss; run it again, and it goes on. A second run changes nothing.
#
# Exit codes: 1 this machine will not do, 3 unsigned or signed by an unknown key, 4 damaged, 5 older than a bundle that
# was accepted before, 6 expired.
set -eu
umask 022
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive

signer='@SIGNER@'
packages='@PACKAGES@'
stick=$(dirname "$(readlink -f "$0")")
store=/srv/llmkeep/bundle
state=/var/lib/llmkeep
opt=/opt/llmkeep

say() { printf 'bootstrap: %s\n' "$1"; }
refuse() { printf 'bootstrap: refused: %s\n' "$2" >&2; exit "$1"; }
field() { sed -n "s/^ \"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\$/\1/p" "$2/MANIFEST.json" | head -n 1; }
link() { ln -sfn "$1" "$2.new" && mv -fT "$2.new" "$2"; }   # a link is replaced in one step
write() { cat > "$1.new" && sync "$1.new" && mv -f "$1.new" "$1" && sync "$(dirname "$1")"; }

# Is every file of folder $1 the signed one, and is there no other?
check_files() {
    sed -n 's/^  {"path": "\([^"]*\)", "size": [0-9]*, "sha256": "\([0-9a-f]*\)".*$/\2  \1/p' "$1/MANIFEST.json" \
        > "$state/sums"
    { cut -c 67- "$state/sums"; echo MANIFEST.json; echo MANIFEST.json.sig; } | sort > "$state/listed"
    (cd "$1" && find . ! -type d | sed 's,^\./,,' | sort) > "$state/present"
    [ "$(grep -c '^  {' "$1/MANIFEST.json")" = "$(grep -c . "$state/sums")" ] || { echo 'unreadable manifest'; return 1; }
    [ -z "$(cd "$1" && find . ! -type d ! -type f)" ] || { echo 'links or devices in it'; return 1; }
    if ! cmp -s "$state/listed" "$state/present"; then
        diff "$state/listed" "$state/present" | sed -n 's/^</missing:/p; s/^>/not in the manifest:/p'
        return 1
    fi
    (cd "$1" && sha256sum --check --strict --quiet "$state/sums" 2>&1)
}

# --- this machine
[ "$(id -u)" = 0 ] || refuse 1 "you are $(id -un), and this needs root: become root and run it again"
. /etc/os-release
[ "$ID:${VERSION_ID:-}" = debian:13 ] || refuse 1 "this is $PRETTY_NAME, tested is Debian 13: take a machine with that"
command -v sqv > /dev/null || refuse 1 'there is no sqv, which apt needs too: install it from your Debian 13 medium'
mkdir -p "$store" "$state" "$opt" /etc/apt/keyrings
exec 9> "$state/bootstrap.lock"
flock -w 10 9 || refuse 1 'another bootstrap is running here: wait for it'

# --- whose bundle is it, and how old
say "checking who signed $stick"
incoming=$store/.incoming judged=$store/.judged
trap 'rm -rf "$incoming" "$judged"' EXIT
rm -rf "$incoming" "$judged"
mkdir "$judged"
# Read once: what is judged here is the manifest that the files are compared with, whatever the stick answers later.
for file in MANIFEST.json MANIFEST.json.sig keyring.pgp; do
    [ -f "$stick/$file" ] || refuse 3 "$stick has no $file: an unsigned bundle is not used, copy it again"
    cp "$stick/$file" "$judged/"
done
who=$(sqv --keyring "$judged/keyring.pgp" --signature-file "$judged/MANIFEST.json.sig" "$judged/MANIFEST.json") ||
    refuse 3 'the signature does not fit the manifest: do not use this bundle, ask who gave it to you'
[ "$who" = "$signer" ] || refuse 3 "signed by $who, expected $signer: do not use this bundle, ask who gave it to you"
serial=$(field serial "$judged")
expires=$(field expires "$judged")
now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
seen=$(cat "$state/serial" 2> /dev/null || echo 0)
case $seen in
'' | *[!0-9]*) refuse 1 "$state/serial reads '$seen', not a number: write the highest serial accepted here into it" ;;
esac
[ "$serial" -ge "$seen" ] || refuse 5 "serial $serial is older than $seen, which was accepted before: carry a newer bundle"
expr "$now" '<' "$expires" > /dev/null || refuse 6 "it expired at $expires, the clock says $now: set it, or carry a newer one"

# --- every file
if cmp -s "$judged/MANIFEST.json" "$store/$serial/MANIFEST.json" && check_files "$store/$serial" > /dev/null; then
    say "serial $serial is here already and whole"
else
    need=$(($(du -sk "$stick" | cut -f 1) + 1500000))
    free=$(df -Pk "$store" | sed -n '2s/  */ /gp' | cut -d ' ' -f 4)
    [ "$free" -ge "$need" ] || refuse 1 "$store has $free kB free, needed are $need: give it more room"
    say "copying serial $serial ($(du -sh "$stick" | cut -f 1))"
    cp -RP "$stick" "$incoming"
    find "$incoming" -type d -empty -delete
    for file in MANIFEST.json MANIFEST.json.sig keyring.pgp; do
        rm -rf "${incoming:?}/$file"
        cp "$judged/$file" "$incoming/"
    done
    say 'checking every file'
    problems=$(check_files "$incoming") ||
        refuse 4 "it is not what was signed, copy it again:
$problems"
    sync -f "$store"   # on disk before it gets its name
    rm -rf "${store:?}/$serial"
    mv "$incoming" "$store/$serial"
fi
echo "$serial" | write "$state/serial"
link "$serial" "$store/current"
# The one before stays, for the way back.
find "$store" -mindepth 1 -maxdepth 1 -type d -name '[0-9]*' -printf '%f\n' | sort -n | head -n -2 |
    while read -r old; do rm -rf "${store:?}/$old"; done

# The sha256 of the certificate itself (DER), as `llmkeep keys escrow` and `openssl x509 -fingerprint -sha256` have it.
escrow=$(sed '/^-----/d' "$store/current/escrow.pem" | base64 -d | sha256sum | cut -d ' ' -f 1)
say "escrow certificate: sha256 $escrow; stop here (Ctrl-C) if your paper says another one"

# --- Debian packages, from the bundle alone
say 'installing Debian packages (a minute)'
cp "$store/current/keyring.pgp" /etc/apt/keyrings/llmkeep.pgp
write "$state/bundle.sources" << END
Types: deb
URIs: file:$store/current/apt
Suites: trixie
Components: main
Signed-By: /etc/apt/keyrings/llmkeep.pgp
END
if [ ! -s /etc/apt/sources.list.d/llmkeep.sources ]; then
    mkdir -p "$state/apt-before"
    find /etc/apt/sources.list /etc/apt/sources.list.d -type f -exec mv -t "$state/apt-before" {} + 2> /dev/null || :
    write /etc/apt/sources.list.d/llmkeep.sources < "$state/bundle.sources"
fi
apt_get() {
    apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::sourcelist="$state/bundle.sources" "$@" > "$state/apt.log" 2>&1 ||
        { cat "$state/apt.log" >&2; refuse 1 "apt-get $1 failed: see above, put it right and run bootstrap again"; }
}
dpkg --configure -a > /dev/null 2>&1 || :   # what a power cut left half done; apt mends the rest
apt_get update
# shellcheck disable=SC2086
apt_get install -y --fix-broken --no-install-recommends $packages

# --- the control node's Python, beside the one before; its name is what is in it
wheels=$store/current/wheels/control
venv=control-$(sha256sum < "$wheels/requirements.txt" | cut -c 1-12)
if [ "$(readlink "$opt/control" || :)" != "$venv" ]; then
    say "installing the control node's Python (half a minute)"
    rm -rf "${opt:?}/$venv"
    python3 -m venv "$opt/$venv"
    "$opt/$venv/bin/pip" --isolated install --quiet --disable-pip-version-check --no-index --find-links "$wheels" --no-deps \
        --ignore-requires-python --require-hashes --only-binary :all: --requirement "$wheels/requirements.txt"
    "$opt/$venv/bin/pip" --isolated check --quiet --disable-pip-version-check
    sync -f "$opt"
    link "$venv" "$opt/control"
    find "$opt" -mindepth 1 -maxdepth 1 -type d -name 'control-*' ! -name "$venv" -exec rm -rf {} +
fi
link "$store/current/tree" "$opt/tree"
mkdir -p /usr/local/bin
link "$opt/control/bin/llmkeep" /usr/local/bin/llmkeep
# The same program under the name that operators type: it records the run, and refuses one that cannot be recorded.
link "$opt/control/bin/llmkeep" /usr/local/bin/ansible-playbook

# --- the estate's certificate authority, made here
say 'certificate authority'
"$opt/control/bin/llmkeep" pki init --escrow "$store/current/escrow.pem" ${1:+--domain "$1"}

# --- who may do what, signed here
say 'policy'
"$opt/control/bin/llmkeep" policy init
"$opt/control/bin/llmkeep" policy build

# --- what is done from here is on record
say 'audit record'
"$opt/control/bin/llmkeep" audit init

say "done: bundle serial $serial, signed by $signer, root key encrypted to the escrow certificate $escrow"
say "next: llmkeep site -i INVENTORY      (the lab's: llmkeep site -i $opt/tree/inventory/lab)"
