#!/bin/sh
# nothing-in-clear.sh OWN PORT OTHER PEER…: exit 1 at the first peer with which the firewall lets a packet pass in clear.
own=$1 port=$2 other=$3
shift 3
for peer; do
  /usr/local/lib/llmkeep/plaintext-probe "$own" "$peer" "$port" "$other" || exit
done
