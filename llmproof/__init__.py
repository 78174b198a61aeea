"""Verification without the rest of llmkeep: the audit record (a chain of records with signed heads) and signed policy bundles.

A small distribution of its own, in the control node's environment and in the hosts'. It imports nothing of either.
"""
