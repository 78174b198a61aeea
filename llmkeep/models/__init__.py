"""External models: check them and their licence, and copy them into a candidate for `llmkeep release sign`."""
