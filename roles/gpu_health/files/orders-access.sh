#!/bin/sh
# orders-access.sh FILE: the file of operators' orders, its lock and its folder, where one is not root's or others may write to it.
find "$(dirname "$1")" -maxdepth 1 \( -path "$(dirname "$1")" -o -name "$(basename "$1" .json).*" \) \( ! -user root -o -perm /022 \)
