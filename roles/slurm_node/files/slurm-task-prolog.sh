#!/bin/sh
# slurm-task-prolog: its output is added to a task's environment.
echo "export CREDENTIALS_DIRECTORY=/run/llmkeep-slurm/$SLURM_JOB_ID"
