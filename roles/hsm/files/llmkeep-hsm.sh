#!/bin/sh
# How this host's key in the HSM stands, as JSON. Exits with 0, or with a code of its own for each fault: docs/operate/hsm.md. Logs in once a token.
# `llmkeep-hsm refused`: a token refused the PIN to somebody else; it is shown no more until another one is sealed.
PYTHONPATH=/usr/local/lib/llmkeep/hsm PYTHONDONTWRITEBYTECODE=1 exec python3 -P -m ansible_collections.llmkeep.estate.plugins.module_utils.hsm.token_keys "$@"
