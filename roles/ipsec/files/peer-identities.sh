#!/bin/sh
# The names that certificates of peers must have, a line each.
swanctl --list-conns --uri unix:///run/llmkeep-ipsec/charon.vici | sed --quiet '/remote public key/,/cacerts/s/.*id: //p' | sort
