"""The control node's state in a repository of restic's elsewhere, and back on new hardware."""
