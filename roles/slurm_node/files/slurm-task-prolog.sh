#!/bin/sh
# slurm-task-prolog: what it prints is added to a task's environment.
echo "export CREDENTIALS_DIRECTORY=/run/llmkeep-slurm/$SLURM_JOB_ID"
