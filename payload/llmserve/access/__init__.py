"""Authentication and authorization: identities, API keys, policy, quotas."""
