#!/bin/sh
# Mode, owner and group of the folder with the socket to the HSM; the group is "nginx's" where nginx.service runs in it.
stat --format='%a %U %G' /run/llmkeep-edge-hsm | sed "s/ $(systemctl show --property=Group --value nginx.service)$/ nginx's/"
