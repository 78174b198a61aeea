#!/bin/sh
# job-wait.sh UNIT SECONDS: the state of a training job once it is done or has failed, or after so many seconds.
set -eu
end=$(($(date +%s) + $2))
while state=$(systemctl show --property=SubState --value "$1"); do
  case $state in exited | failed | dead) break ;; esac
  [ "$(date +%s)" -lt "$end" ] || break
  sleep 5
done
echo "$state"
