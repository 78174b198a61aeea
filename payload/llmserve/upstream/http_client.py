"""The client's former place, which `instances` imports."""

from llmserve.http_client import HttpClient as HttpClient
