"""DDP, FSDP2 and DeepSpeed's ZeRO behind one protocol, and the evidence of which one runs.

What runs is not always what was asked for: a library that finds no GPU may fall back without a word. So `evidence` looks
at the object that does the work and at what each rank holds, and `proven` refuses anything else.
"""
