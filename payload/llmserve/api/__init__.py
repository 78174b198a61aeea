"""OpenAI's API and `/generate` as data: requests, responses, errors."""
