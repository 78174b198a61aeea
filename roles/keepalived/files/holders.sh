#!/bin/sh
# holders.sh OWN [ADDRESS…]: each ADDRESS and how many hosts have it: this one, and those that answer ARP requests from its address OWN. Where it is not
# one, it is asked again for 10 s: so long a move may take.
own=$1
shift
link=$(ip -oneline address show to "$own" | awk '{print $2; exit}')
for address; do
  for _ in 1 2 3 4 5; do
    here=$(ip -oneline address show to "$address" | wc -l)
    elsewhere=$(arping -b -c 2 -w 2 -I "$link" -s "$own" "$address" | sed -n 's/.*reply from.*\[\(.*\)\].*/\1/p' | sort -u | wc -l)
    [ $((here + elsewhere)) = 1 ] && break
  done
  echo "$address $((here + elsewhere))"
done
