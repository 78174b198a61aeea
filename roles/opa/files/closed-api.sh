#!/bin/sh
# OPA's status for each part of its API that only an administrator would use, a line each.
query() { /usr/local/lib/llmkeep/opa-query "$@" | head -n 1 | cut -c 1-3; }
query PUT /v1/policies/llm 'package llm.authz'
query GET /v1/policies
query GET /v1/data
query PUT /v1/data/llm/roles '{}'
query POST /v1/data/llm '{}'
query POST /v1/query '{"query": "data"}'
query POST /v1/compile '{"query": "data"}'
query GET /v1/config
query GET /metrics
