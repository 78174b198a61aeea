#!/bin/sh
# holders.sh OWN [ADDRESS…]: each ADDRESS and how many hosts have it: this one, and those that answer ARP requests from its address OWN.
own=$1
shift
link=$(ip -oneline address show to "$own" | awk '{print $2; exit}')
for address; do
  here=$(ip -oneline address show to "$address" | wc -l)
  elsewhere=$(arping -b -c 2 -w 2 -I "$link" -s "$own" "$address" | sed -n 's/.*reply from.*\[\(.*\)\].*/\1/p' | sort -u | wc -l)
  echo "$address $((here + elsewhere))"
done
