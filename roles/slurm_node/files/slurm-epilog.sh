#!/bin/sh -e
# slurm-epilog: takes the checkpoints' key away again.
rm --recursive --force "/run/llmkeep-slurm/$SLURM_JOB_ID"
