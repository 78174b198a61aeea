"""Answers that are kept or shared."""
