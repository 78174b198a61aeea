"""Health of NVIDIA GPUs: readings, Xid events, acceptance, quarantine, metrics. See docs/gpu-health.md."""
