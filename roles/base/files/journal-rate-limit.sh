#!/bin/sh
# The journal's rate limit as systemd reads it: the last file that sets it wins.
systemd-analyze cat-config systemd/journald.conf | grep '^RateLimitIntervalSec=' | tail --lines=1
