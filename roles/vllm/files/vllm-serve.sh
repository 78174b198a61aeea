#!/bin/sh
# vllm-serve RELEASE MODEL: vLLM with its key, which comes by a credential and goes on in the environment. Arguments are visible to every user.
VLLM_API_KEY=$(cat "$CREDENTIALS_DIRECTORY/vllm.key") || exit 1
export VLLM_API_KEY
release=$(readlink -f "$1") || exit 1
exec "$release/bin/vllm" serve --config "$release/etc/$2.yaml"
