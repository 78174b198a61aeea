#!/bin/sh
# logged-requests.sh REQUEST ADDRESS:PORT NAME SOCKET…: the findings of two checks, from what nginx logs of some requests for a path that does not exist;
# REQUEST is the program https-request.sh. `gateways`: nginx asked the gateway of every SOCKET. `limits`: it counted each request by both limits.
request=$1 address=$2 name=$3
shift 3
mark=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
sent=0 log='' limited='' unasked=''
logged() { journalctl --since=-1min --identifier=llmkeep_edge --no-pager --output=cat | grep -F "/verify-$mark"; }
# Requests that other clients have open may keep one gateway from being the least busy, so each has five chances.
for _ in 1 2 3 4 5; do
  for socket; do
    sh -c "$request" https-request.sh "$address" "$name" GET "/verify-$mark" 0 > /dev/null
    sent=$((sent + 1))
  done
  for _ in 1 2 3 4 5 6 7 8 9 10 11 12; do
    log=$(logged)
    [ "$(echo "$log" | grep -c .)" -ge "$sent" ] && break
    sleep 0.25
  done
  unasked=''
  for socket; do echo "$log" | grep -qF "unix:$socket" || unasked="$unasked $socket"; done
  if [ -z "$log" ] || [ -z "$unasked" ]; then break; fi
done
limited=$(echo "$log" | sed -n 's/.*"limited":"\([^"]*\)".*/\1/p' | sort -u | tr '\n' ' ')
finding() { printf '"%s": {"ok": %s, "observed": "%s"}' "$1" "$2" "$3"; }
printf '{"checks": {'
finding gateways "$([ -z "$unasked" ] && echo true || echo false)" "$sent requests, none to:${unasked:- -}"
printf ', '
finding limits "$(echo "$limited" | grep -qxE '((PASSED|REJECTED){2} )+' && echo true || echo false)" "limit_req and limit_conn: ${limited:-no request logged}"
printf '}}\n'
