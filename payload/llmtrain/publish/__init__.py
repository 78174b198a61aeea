"""From a job's output to a release candidate."""
