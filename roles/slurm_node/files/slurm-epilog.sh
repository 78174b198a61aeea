#!/bin/sh -e
# slurm-epilog: removes the checkpoints' key again.
rm --recursive --force "/run/llmkeep-slurm/$SLURM_JOB_ID"
