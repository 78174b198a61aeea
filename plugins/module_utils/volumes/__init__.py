"""LUKS2 volumes: disks, headers, key slots, mount points."""
