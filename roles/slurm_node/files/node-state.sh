#!/bin/sh
# node-state.sh NODE: the node's state and its reason, from the controller, once the node registered: within seconds of its slurmd's start.
for _ in $(seq 40); do
  state=$(sinfo --noheader --nodes="$1" --partition=train --format='%t %E') || exit 1
  case $state in unk* | *\** | down*) sleep 0.2 ;; *) break ;; esac
done
echo "$state"
