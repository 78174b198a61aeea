"""The audit record: an append-only chain of records with signed heads. A small distribution of its own."""
