"""OpenAI's API and `/generate` as data: bodies of requests, answers, errors."""
