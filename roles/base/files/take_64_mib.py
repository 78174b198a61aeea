"""Allocate 64 MiB of memory and touch each page."""

taken = b"x" * (64 << 20)
