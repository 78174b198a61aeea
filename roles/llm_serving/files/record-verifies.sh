#!/bin/sh
# Exit 0 where the audit record verifies, or where it has no record yet (4).
llm-audit verify /var/log/llm-audit
case $? in 0 | 4) ;; *) exit 1 ;; esac
