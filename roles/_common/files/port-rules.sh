#!/bin/sh
# port-rules.sh PORT: the firewall's rules for PORT, in order.
nft list chain inet llmkeep input | sed -n "s/^[[:space:]]*ip6\{0,1\} //; s/^[[:space:]]*//; / dport $1 /p"
