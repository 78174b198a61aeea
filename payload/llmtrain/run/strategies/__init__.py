"""DDP, FSDP2 and DeepSpeed's ZeRO behind one protocol, with evidence of which one runs.

The requested strategy is not always the one that runs: a library that finds no GPU may fall back silently. So `evidence` examines
the object that does the work and the contents of each rank, and `proven` refuses anything else.
"""
