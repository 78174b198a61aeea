"""Software bills of materials of bundles and hosts."""
