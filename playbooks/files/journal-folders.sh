#!/bin/sh
# journal-folders.sh FOLDER HOST...: a folder in FOLDER for the journal of each host, and of no other host; names those that it removed.
set -eu
umask 077
mkdir -p "$1"
cd "$1"
shift
mkdir -p -- "$@"
for copy in *; do
  case " $* " in *" $copy "*) continue ;; esac
  rm -rf -- "$copy"
  echo "$copy"
done
