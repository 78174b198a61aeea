#!/bin/sh
# model-checksums.sh FOLDER MODEL…: exit 1 at the first model whose files are not those of its signed SHA256SUMS.
folder=$1
shift
for model; do
  cd "$folder/$model" && sha256sum --check --strict --quiet SHA256SUMS || exit 1
done
