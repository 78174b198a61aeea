"""From a plan to trained weights: processes, steps, checkpoints, health."""
