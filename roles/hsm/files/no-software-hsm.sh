#!/bin/sh
# Exit 1 where the HSM is SoftHSM and the inventory does not allow it.
if p11-kit list-modules | grep -q '^ *manufacturer: SoftHSM'; then
  grep -q '"double_allowed": true' /etc/llmkeep/hsm.json && { echo "a double, which the inventory allows"; exit 0; }
  echo "SoftHSM is a double and protects nothing: use an HSM, or in a lab set hsm_double_allowed"
  exit 1
fi
echo "no double"
