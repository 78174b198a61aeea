"""The organization's own documents: cut into passages, kept in Elasticsearch, and found for those who may read them."""
