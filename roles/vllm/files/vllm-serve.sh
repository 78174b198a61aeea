#!/bin/sh
# vllm-serve RELEASE MODEL: runs vLLM with its key, from a credential, in the environment. Arguments would be visible to every user.
VLLM_API_KEY=$(cat "$CREDENTIALS_DIRECTORY/vllm.key") || exit 1
export VLLM_API_KEY
release=$(readlink -f "$1") || exit 1
exec "$release/bin/vllm" serve --config "$release/etc/$2.yaml"
