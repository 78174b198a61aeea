"""Who calls, and what the caller may do: identities, API keys, policy, quotas."""
