"""Health of NVIDIA GPUs: readings, Xid events, acceptance, quarantine, metrics. See docs/operate/gpu-health.md."""
