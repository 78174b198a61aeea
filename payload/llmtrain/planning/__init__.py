"""From a job, a model and the hardware to a plan: strategy, batch sizes, memory and time, before anything starts."""
