#!/bin/sh
# gpu-memory.sh MIB DECLARED GPU…: exit 1 at the first GPU with less memory than MIB; DECLARED is that size in the message.
wanted=$1 declared=$2
shift 2
for number; do
  seen=$(nvidia-smi --id="$number" --query-gpu=memory.total --format=csv,noheader,nounits) || exit 1
  [ "$seen" -ge "$wanted" ] || { echo "GPU $number has $seen MiB, declared are $declared"; exit 1; }
done
