#!/bin/sh
# Report what dpkg left unfinished at a power cut, and complete it before anything else is installed. These are functions for /bin/sh, because Python itself
# may be among the unfinished packages.
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
dpkg_admin=${DPKG_ADMINDIR:-${DPKG_ROOT:-}/var/lib/dpkg}
policy_rc_d=${DPKG_ROOT:-}/usr/sbin/policy-rc.d
no_service_starts=$(printf '#!/bin/sh\nexit 101') # as ansible.builtin.apt writes it, and removes it when it ends

# One line each: a journal that was not closed, which makes apt refuse to run; half-installed packages; a ban on starting services that outlived its apt run.
half_done() {
    entries=$(find "$dpkg_admin/updates" -name '[0-9]*' | wc -l)
    [ "$entries" = 0 ] || echo "entries in dpkg's journal: $entries"
    dpkg-query --show --showformat='${db:Status-Abbrev} ${binary:Package} is ${db:Status-Status}\n' 2> /dev/null |
        sed -n -e 's/^..R //p' -e t -e 's/^.[HUFWt]. //p'
    [ "$(cat "$policy_rc_d" 2> /dev/null)" != "$no_service_starts" ] || echo "$policy_rc_d lets no service start"
}

# Another apt or dpkg may be running, which is not an unfinished state: wait up to 300 s for it.
configure_all() {
    tries=150
    until said=$(dpkg --force-confdef --force-confold --configure -a 2>&1 < /dev/null); do
        case $said in *"locked by another process"*) tries=$((tries - 1)) ;; *) return ;; esac
        [ "$tries" -gt 0 ] || return
        sleep 2
    done
}

# Prints what was unfinished; exits with 1, printing the rest, if it could not be completed. The arguments are passed to apt-get, for its sources.
complete() {
    found=$(half_done)
    [ -n "$found" ] || return 0
    [ -e "$policy_rc_d" ] || { printf '%s\n' "$no_service_starts" > "$policy_rc_d" && chmod 0755 "$policy_rc_d"; }
    configure_all || :
    # A package that was interrupted while it was unpacked has to be unpacked again, from the mirror's current files.
    if half_done | grep -qvxF "$policy_rc_d lets no service start"; then
        for step in update 'install --fix-broken'; do
            # shellcheck disable=SC2086 # two words
            said=$(apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confdef \
                -o Dpkg::Options::=--force-confold -o APT::Install-Recommends=false "$@" $step 2>&1 < /dev/null) || break
        done
    fi
    [ "$(cat "$policy_rc_d")" != "$no_service_starts" ] || rm "$policy_rc_d"
    left=$(half_done)
    [ -z "$left" ] || { printf '%s\n' "$left" "$said"; return 1; }
    printf '%s\n' "$found"
}

# Check that each package is installed and marked as manually installed, so that apt would change nothing.
all_there() {
    said=$(dpkg-query --show --showformat='${db:Status-Abbrev}\n' -- "$@" 2> /dev/null) || return
    if printf '%s\n' "$said" | grep -qv '^ii '; then return 1; fi
    brought_by_others=$(apt-mark showauto "$@" 2> /dev/null) && [ -z "$brought_by_others" ]
}
