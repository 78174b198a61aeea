"""The control node of an estate: bundle, certificate authority, policy, audit record, playbook runs."""
