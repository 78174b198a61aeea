"""Files, units, limits, checks and sealed secrets of a host."""
