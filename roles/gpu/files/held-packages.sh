#!/bin/sh
# held-packages.sh PACKAGE...: those of a driver, and of its kernel, that apt is free to change.
kernel=$(cat /var/lib/llmkeep/gpu/kernel) || echo "no kernel is recorded"
held=" $(apt-mark showhold | tr '\n' ' ')"
for package in "linux-image-$kernel" "linux-headers-$kernel" "$@"; do
  case $held in
    *" $package "*) ;;
    *) echo "$package" ;;
  esac
done
