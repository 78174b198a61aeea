"""Back up the control node's state to a restic repository elsewhere, and restore it on new hardware."""
