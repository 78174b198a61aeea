"""The record of runs from this node, and the witness of the other hosts' records."""
