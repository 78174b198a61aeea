#!/bin/sh
# node-state.sh NODE: the node's state, and why, as the controller has it, once it heard of it: a node registers within seconds after its slurmd started.
for _ in $(seq 40); do
  state=$(sinfo --noheader --nodes="$1" --partition=train --format='%t %E') || exit 1
  case $state in unk* | *\** | down*) sleep 0.2 ;; *) break ;; esac
done
echo "$state"
