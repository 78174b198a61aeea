"""The organization's own documents: split into passages, stored in Elasticsearch, and searched for callers who may read them."""
