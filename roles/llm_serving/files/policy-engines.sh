#!/bin/sh
# How the gateways' configurations say that requests are judged, each value once.
cat /etc/llmkeep/serving/gateway-*.yaml | grep -E "^  engine: " | sort --unique
