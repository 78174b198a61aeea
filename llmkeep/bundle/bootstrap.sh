#!/bin/sh
# bootstrap [DOMAIN | --restore]: turns a bare Debian 13 machine into the estate's control node, from this bundle alone.
# DOMAIN is the estate's, base_domain in its inventory (default: estate.internal). With --restore it makes no authority, policy
# and record: `llmkeep backup restore` brings those of the estate whose control node was lost.
#
# Compare this file's sha256 with the one that `llmkeep bundle build` printed BEFORE you run it: it contains the
# fingerprint of the only key whose bundles it accepts. It needs root, and tools of every Debian 13: apt, awk, sed, sqv.
#
# It works on a copy: copies the bundle, checks signature, type, expiry, serial, then every file; until then nothing of the
# bundle is run. Each step may be interrupted by a power loss; run it again, and it continues. A second run changes nothing.
# A bundle on several media, or a delta: run it from each medium, in any order; it names the missing ones.
#
# Exit codes: 1 this machine is unsuitable, 3 unsigned, signed by an unknown key or as something else, 4 damaged, 5 older
# than a bundle that was accepted before, 6 expired, 7 more media are needed, 8 a medium of another bundle, or another base.
set -eu
umask 022
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive

signer='@SIGNER@'
packages='@PACKAGES@'
stick=$(dirname "$(readlink -f "$0")")
store=/srv/llmkeep/bundle
releases=/srv/llmkeep/releases
state=/var/lib/llmkeep
opt=/opt/llmkeep

say() { printf 'bootstrap: %s\n' "$1"; }
refuse() { code=$1; shift; printf 'bootstrap: refused: %s\n' "$*" >&2; exit "$code"; }
field() { sed -n "s/^ \"$1\": \"\{0,1\}\([^\"]*[^\",]\)\"\{0,1\},\$/\1/p" "$2" | head -n 1; }
link() { ln -sfn "$1" "$2.new" && mv -fT "$2.new" "$2"; }   # a link is replaced in one step
write() { cat > "$1.new" && sync "$1.new" && mv -f "$1.new" "$1" && sync "$(dirname "$1")"; }

# The files that folder $1's manifest names: sha256, size, path.
table() {
    sed -n 's/^  {"path": "\([^"]*\)", "size": \([0-9]*\), "sha256": "\([0-9a-f]*\)".*$/\3 \2 \1/p' "$1/MANIFEST.json"
}

present() { (cd "$1" && find . ! -type d | sed 's,^\./,,' | sort); }

# Is every file of folder $1 the signed one, and is there no other?
check_files() {
    table "$1" | sed 's/ [0-9]* /  /' > "$state/sums"
    { cut -c 67- "$state/sums"; echo MANIFEST.json; echo MANIFEST.json.sig; } | sort > "$state/listed"
    present "$1" > "$state/present"
    [ -z "$(cd "$1" && find . ! -type d ! -type f)" ] || { echo 'links or devices in it'; return 1; }
    compare || return 1
    (cd "$1" && sha256sum --check --strict --quiet "$state/sums" 2> /dev/null)
}

compare() {   # what is listed with what is present
    cmp -s "$state/listed" "$state/present" && return
    diff "$state/listed" "$state/present" | sed -n 's/^</missing:/p; s/^>/not in the manifest:/p'
    return 1
}

# Of the files of the manifest those that incoming does not have, or with another size: sha256, size, path.
absent() {
    { [ ! -d "$incoming" ] || find "$incoming" -type f -printf '%s %P\n'; } |
        awk 'pass == 1 { size[$2] = $1; next } !($3 in size) || size[$3] != $2' pass=1 - pass=2 "$state/files"
}

# The files of the bundles or releases $@ that are on this disk and only root can change: sha256, size, path.
at_hand() {
    for folder in "$@"; do
        [ -f "$folder/MANIFEST.json" ] || continue
        [ "$(stat -Lc %d "$folder")" = "$(stat -c %d "$store")" ] || continue
        table "$folder" > "$state/table"
        find "$folder/" -type f -user 0 ! -perm /022 -printf '%s %P\n' | awk -v folder="$folder" 'pass == 1 { size[$2] = $1; next }
            ($3 in size) && size[$3] == $2 { print $1, $2, folder "/" $3 }' pass=1 - pass=2 "$state/table"
    done
}

make_folders() { awk '{ print $NF }' "$1" | sed -n 's,/[^/]*$,,p' | sort -u | (cd "$incoming" && xargs -r mkdir -p --); }

# What is absent and is in the folders $@ gets one more name: a link takes no space.
link_files() {
    at_hand "$@" > "$state/here"
    absent | awk 'pass == 1 { if (!($1 in at)) at[$1] = $3; next } ($1 in at) { print at[$1], $3 }' \
        pass=1 "$state/here" pass=2 - > "$state/links"
    make_folders "$state/links"
    while read -r from to; do ln -f "$from" "$incoming/$to"; done < "$state/links"
}

# Copy what is absent from the medium, each content once; never into a file that has another name, too.
copy_files() {
    absent | awk 'pass == 1 { carried[$1]; next } ($3 in carried) && !seen[$1]++ { print $3; bytes += $2 }
        END { printf "%.0f\n", bytes > total }' total="$state/copy.bytes" pass=1 "$state/carried" pass=2 - > "$state/copies"
    [ -s "$state/copies" ] || return 0
    make_folders "$state/copies"
    show_copy "$(cat "$state/copy.bytes")" 9>&- &
    shown=$! stopped=''
    (cd "$stick" && xargs cp -P --remove-destination --parents -t "$incoming" --) < "$state/copies" 2> "$state/copy.log" || stopped=yes
    kill "$shown" 2> /dev/null || :
    wait "$shown" 2> /dev/null || :
    [ -z "$stopped" ] ||
        refuse 1 "copying stopped ($(head -n 1 "$state/copy.log")): reconnect the medium, or make room; run it again to continue"
}

# Each ten seconds, how much of $1 bytes is copied and how long the rest takes, until it is killed or bootstrap is gone.
show_copy() {
    begun=$(date +%s)
    before=$(du -sb "$incoming" | cut -f 1)
    while sleep 10 > /dev/null 2>&1 && kill -0 $$ 2> /dev/null; do
        du -sb "$incoming" | awk -v before="$before" -v total="$1" -v seconds=$(($(date +%s) - begun)) '{
            copied = $1 - before; rate = copied / (seconds > 0 ? seconds : 1)
            printf "bootstrap: copied %.1f of %.1f GB, %.1f MB/s", copied / 1e9, total / 1e9, rate / 1e6
            if (rate > 0) printf ", about %d min left", (total - copied) / rate / 60 + 1
            print "" }'
    done 2> /dev/null
}

check_carried() {
    awk 'pass == 1 { carried[$1]; next } ($3 in carried) { print $1 "  " $3 }' \
        pass=1 "$state/carried" pass=2 "$state/files" > "$state/sums"
    (cd "$incoming" && sha256sum --check --strict --quiet "$state/sums" 2> /dev/null)
}

# Remove from incoming what is not as signed, by the output of sha256sum in $1.
discard() { printf '%s\n' "$1" | sed -n 's/: FAILED.*$//p' | (cd "$incoming" && xargs -r rm -f --); }

# Which media have the absent files, a line each.
to_bring() {
    absent | awk 'pass == 1 { of[$2] = $1; next } pass == 2 { if ($3 in of) on[$1] = of[$3]; next }
        !seen[$1]++ { files[on[$1]]++; bytes[on[$1]] += $2 }
        END { for (medium in files) printf "%s: %d files, %.1f MB\n", medium == "" ? "a whole bundle" : "medium " medium,
            files[medium], bytes[medium] / 1e6 }' pass=1 "$state/media" pass=2 "$state/files" pass=3 - | sort
}

# --- this machine
[ "$(id -u)" = 0 ] || refuse 1 "you are $(id -un), but this needs root: become root and run it again"
. /etc/os-release
[ "$ID:${VERSION_ID:-}" = debian:13 ] || refuse 1 "this is $PRETTY_NAME, but only Debian 13 is supported: use a machine with that"
command -v sqv > /dev/null || refuse 1 'sqv, which apt also needs, is missing: install it from your Debian 13 medium'
mkdir -p "$store" "$state" "$opt" /etc/apt/keyrings
exec 9> "$state/bootstrap.lock"
flock -w 10 9 || refuse 1 'another bootstrap is running here: wait until it has finished'

# --- whose bundle is it, and how old
say "checking who signed $stick"
incoming=$store/.incoming judged=$store/.judged
trap 'rm -rf "$judged"' EXIT
rm -rf "$judged"
mkdir "$judged"
# Read once: what is judged here is the manifest that the files are compared with, whatever the stick answers later.
for file in MANIFEST.json MANIFEST.json.sig keyring.pgp; do
    [ -f "$stick/$file" ] || refuse 3 "$stick has no $file: an unsigned bundle is not used, copy it again"
    cp "$stick/$file" "$judged/"
done
who=$(sqv --keyring "$judged/keyring.pgp" --signature-file "$judged/MANIFEST.json.sig" "$judged/MANIFEST.json") ||
    refuse 3 'the signature does not match the manifest: do not use this bundle, ask its sender'
[ "$who" = "$signer" ] || refuse 3 "signed by $who, but $signer is expected: do not use this bundle, ask its sender"
type=$(field type "$judged/MANIFEST.json")
[ "$type" = bundle ] || refuse 3 "its manifest is signed as '$type', but 'bundle' is needed: use one that was built as a bundle"
serial=$(field serial "$judged/MANIFEST.json")
expires=$(field expires "$judged/MANIFEST.json")
now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
seen=$(cat "$state/serial" 2> /dev/null || echo 0)
case $seen in
'' | *[!0-9]*) refuse 1 "$state/serial reads '$seen', not a number: write the highest serial accepted here into it" ;;
esac
[ "$serial" -ge "$seen" ] || refuse 5 "serial $serial is older than $seen, which was accepted before: use a newer bundle"
expr "$now" '<' "$expires" > /dev/null || refuse 6 "it expired at $expires, and the clock says $now: set it, or use a newer one"

# --- what this medium carries
# MEDIUM.json is not signed: it says which medium to plug in next, and never what is right.
[ -z "$(cd "$stick" && find . ! -type d ! -type f)" ] || refuse 4 'it has links or devices in it: copy it again'
table "$judged" > "$state/files"
! grep -Eq '( |/)\.{0,2}(/|$)' "$state/files" || refuse 4 'its manifest has a path that leads out of it'
[ "$(grep -c '^  {' "$judged/MANIFEST.json")" = "$(grep -c . "$state/files")" ] || refuse 4 'unreadable manifest'
number=1 of=1 base=''
if [ -e "$stick/MEDIUM.json" ]; then
    head -c 67108864 "$stick/MEDIUM.json" > "$judged/MEDIUM.json"
    number=$(field medium "$judged/MEDIUM.json") of=$(field of "$judged/MEDIUM.json")
    base=$(field base_title "$judged/MEDIUM.json" | tr -cd 'A-Za-z0-9 .,_-')
    case :$number:$of: in *::* | *[!0-9:]* | ???????????*) refuse 4 'MEDIUM.json cannot be read: copy the medium again' ;; esac
    [ "$(field manifest "$judged/MEDIUM.json")" = "$(sha256sum < "$judged/MANIFEST.json" | cut -c 1-64)" ] ||
        refuse 4 'MEDIUM.json belongs to another bundle than the manifest beside it: copy the medium again'
    sed -n 's/^  {"path": "\([^" ]*\)", "medium": \([0-9]\{1,4\}\), .*$/\2 \1/p' "$judged/MEDIUM.json" > "$state/media"
    stray=$(awk 'pass == 1 { named[$3]; next } !($2 in named)' pass=1 "$state/files" pass=2 "$state/media" | wc -l)
    [ "$stray" = 0 ] || refuse 4 "MEDIUM.json lists $stray files that were not signed: do not use this medium"
    { sed -n "s/^$number //p" "$state/media"; echo bootstrap; echo keyring.pgp; } | sort -u > "$state/carried"
    say "medium $number of $of of serial $serial${base:+, a delta from $base}"
else
    awk '{ print 1, $3 }' "$state/files" > "$state/media"
    cut -d ' ' -f 3 "$state/files" | sort > "$state/carried"
fi
{ cat "$state/carried"; echo MANIFEST.json; echo MANIFEST.json.sig; } | sort > "$state/listed"
present "$stick" | grep -vx MEDIUM.json > "$state/present"
problems=$(compare) || refuse 4 "it differs from what was signed, copy it again:
$problems"

# --- every file
if cmp -s "$judged/MANIFEST.json" "$store/$serial/MANIFEST.json" && check_files "$store/$serial" > /dev/null; then
    say "serial $serial is here already and whole"
else
    if ! cmp -s "$judged/MANIFEST.json" "$incoming/MANIFEST.json"; then
        # One that was overtaken gives way; one that may still be completed does not.
        begun=$([ ! -f "$incoming/MANIFEST.json" ] || field serial "$incoming/MANIFEST.json")
        [ "${begun:-0}" -le "$seen" ] || refuse 8 "this medium belongs to serial $serial, but serial $begun, created" \
            "$(field created "$incoming/MANIFEST.json"), is incomplete here: use its other media, or abandon it with rm -r $incoming"
    fi
    at_hand "$incoming" "$store"/[0-9]* "$releases"/* > "$state/here"
    absent | awk 'pass == 1 { here[$1]; next } !($1 in here) && !seen[$1]++' pass=1 "$state/here" pass=2 - > "$state/new"
    cut -d ' ' -f 2 "$state/media" | cat - "$state/carried" > "$state/listed"
    nowhere=$(awk 'pass == 1 { listed[$1]; next } pass == 2 { if ($3 in listed) on[$1]; next } !($1 in on) { print $3 }' \
        pass=1 "$state/listed" pass=2 "$state/files" pass=3 "$state/new")
    if [ -n "$nowhere" ]; then
        lost="$(echo "$nowhere" | wc -l) files are neither on its media nor here, the first is $(echo "$nowhere" | head -n 1)"
        [ -n "$base" ] || refuse 4 "$lost: do not use this medium"
        refuse 8 "$lost. It is a delta from $base, but serial $seen is in use here: use a delta from that, or a full bundle"
    fi
    need=$(($(awk '{ kilobytes += int($2 / 1024) + 4 } END { printf "%.0f", kilobytes }' "$state/new") + 1500000))
    free=$(df -Pk "$store" | sed -n '2s/  */ /gp' | cut -d ' ' -f 4)
    [ "$free" -ge "$need" ] || refuse 1 "$store has $free kB free, but $need are needed: make room"
    mkdir -p "$incoming"
    (cd "$incoming" && find . ! -type d -printf '%y %s %P\n') |
        awk 'pass == 1 { size[$3] = $2; next } !($1 == "f" && size[$3] == $2 || $3 ~ /^MANIFEST\.json(\.sig)?$/) { print $3 }' \
            pass=1 "$state/files" pass=2 - | (cd "$incoming" && xargs -r rm -f --)
    for file in MANIFEST.json.sig keyring.pgp MANIFEST.json; do write "$incoming/$file" < "$judged/$file"; done
    link_files "$incoming" "$store"/[0-9]* "$releases"/*
    say "copying serial $serial ($(awk '{ bytes += $2 } END { printf "%.1f", bytes / 1e6 }' "$state/new") MB of it are new here)"
    copy_files
    link_files "$incoming"
    if [ -n "$(absent)" ]; then
        problems=$(check_carried) || {
            # A power cut may have damaged what an earlier run copied.
            discard "$problems"
            copy_files
            problems=$(check_carried) || {
                discard "$problems"
                refuse 4 "this medium differs from what was signed, copy it again; the other files are kept:
$problems"
            }
        }
        sync -f "$store"
        say "serial $serial is not complete yet, bring"
        to_bring
        exit 7
    fi
    say 'checking every file'
    problems=$(check_files "$incoming") || {
        # What was here already may be what is damaged; if not this medium, another one has it.
        discard "$problems"
        copy_files
        link_files "$incoming"
        if [ -n "$(absent)" ]; then
            say "damaged here:
$problems
bring"
            to_bring
            exit 7
        fi
        problems=$(check_files "$incoming") || {
            discard "$problems"
            refuse 4 "it differs from what was signed, copy it again:
$problems"
        }
    }
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
        { cat "$state/apt.log" >&2; refuse 1 "apt-get $1 failed: see above, fix it and run bootstrap again"; }
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

if [ "${1:-}" = --restore ]; then
    say "done: bundle serial $serial, signed by $signer"
    say 'next: llmkeep backup restore REPOSITORY --escrow-key KEY'
    exit 0
fi

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
