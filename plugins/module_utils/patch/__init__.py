"""Elasticsearch: the module of its settings, and the one of its API keys."""
