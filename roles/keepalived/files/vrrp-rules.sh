#!/bin/sh
# The firewall's rules for VRRP, which is protocol 112, in both directions.
for chain in input output; do
  nft --numeric-protocol list chain inet llmkeep "$chain" | sed -n '/l4proto 112/s/^[[:space:]]*ip6\{0,1\} //p'
done
