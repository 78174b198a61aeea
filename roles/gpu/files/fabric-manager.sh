#!/bin/sh
# fabric-manager.sh DEVICES LOADED VERSION [start]: exit 1 unless the fabric manager is where NVSwitches are, and there alone, in the version
# of the driver that is loaded, which the file LOADED states. VERSION, which may be empty: of the set, whose driver may still wait for a boot.
# With start it need not be enabled yet, and 3 says that it is not to be started before that boot.
waits=0
[ "$4" != start ] || waits=3
unit=nvidia-fabricmanager.service
switches=0
for place in "$1"/*; do
  [ "$(cat "$place/vendor" 2>&1)" = 0x10de ] || continue
  case $(cat "$place/class") in 0x0680*) switches=$((switches + 1)) ;; esac
done
if [ "$switches" = 0 ]; then
  [ "$(systemctl is-enabled $unit 2>&1)" != enabled ] || { echo "no NVSwitch is here, and $unit is enabled: disable it"; exit 1; }
  echo "no NVSwitch" && exit
fi
mine=$(nv-fabricmanager --version | sed -n 's/.*version is *: *\([0-9.]*\).*/\1/p')
[ -n "$mine" ] || { echo "$switches NVSwitches, and no fabric manager"; exit 1; }
[ -f "$2" ] || { echo "fabric manager $mine, no driver is loaded: reboot"; exit $waits; }
loaded=$(sed -n 's/.*Kernel Module\( for [^ ]*\)\{0,1\} *\([0-9][0-9.]*\).*/\2/p' "$2")
if [ "$mine" != "$loaded" ]; then
  echo "the fabric manager is $mine and the loaded driver is $loaded: both have to be the same"
  [ "$mine" = "$3" ] || exit 1
  echo "the driver $mine is loaded by the next boot" && exit $waits
fi
[ "$4" = start ] || [ "$(systemctl is-enabled $unit 2>&1)" = enabled ] || { echo "$unit is not enabled at boot"; exit 1; }
echo "fabric manager $mine, as the driver"
