#!/bin/sh
# slurm-cluster: waits until slurmdbd answers, and adds this cluster to it.
export SLURM_CONF=/etc/slurm/slurm.conf
until known=$(sacctmgr --noheader --parsable2 list cluster format=cluster 2> /dev/null); do sleep 0.2; done
[ "$known" = estate ] || sacctmgr --immediate --quiet add cluster estate
