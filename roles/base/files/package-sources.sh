#!/bin/sh
# Every address that `apt-get update` would fetch, followed by address and keyring of each downloaded package list.
# shellcheck disable=SC2016 # apt's variables
apt-get --print-uris update && apt-get indextargets --format '$(REPO_URI) $(SIGNED_BY)' 'Created-By: Packages'
