#!/bin/sh -e
# slurm-prolog: gives a job the checkpoints' key, as systemd gives it to a unit: in memory, readable only by the job's user.
folder=/run/llmkeep-slurm/$SLURM_JOB_ID
install --directory --mode=0711 "$folder"
install --mode=0400 --owner="$SLURM_JOB_UID" /run/credentials/slurmd.service/llm-train.key "$folder/llm-train.key"
