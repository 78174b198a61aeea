"""Manifests in a Kubernetes cluster: what is declared, what a cluster allows, and how it gets there."""
