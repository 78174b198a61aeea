#!/bin/sh
# logged-path.sh REQUEST ADDRESS:PORT NAME: REQUEST is the program https-request.sh.
# Requests a path that does not exist, with a query that must not be logged: the path has to be in the journal, and the query nowhere.
random() { od -An -N8 -tx1 /dev/urandom | tr -d ' \n'; }
journal() { journalctl --since=-1min --no-pager --output=cat; }
mark=$(random) secret=$(random) path='path not logged' query='query not logged'
sh -c "$1" https-request.sh "$2" "$3" GET "/verify-$mark?prompt=$secret" 0 > /dev/null
for _ in 1 2 3 4 5 6 7 8 9 10 11 12; do
  if journal | grep -q "$mark"; then path='path logged'; break; fi
  sleep 0.25
done
if journal | grep -q "$secret" || grep -rqs "$secret" /var/log/nginx; then query='query logged'; fi
echo "$path, $query"
