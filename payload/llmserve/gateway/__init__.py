"""From a request to its answer: the gateway process, its routes and its middleware."""
