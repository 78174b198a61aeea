"""Examples judged by annotators in Label Studio, and their agreement."""
