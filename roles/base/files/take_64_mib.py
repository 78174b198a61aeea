"""Take 64 MiB of memory, and touch each page of it."""

taken = b"x" * (64 << 20)
