"""What was run from here, and the witness of the other hosts' records."""
