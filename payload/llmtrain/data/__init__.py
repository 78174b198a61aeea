"""From raw text to packed rows: read, clean, annotate, filter, deduplicate, decontaminate, tokenize, pack."""
