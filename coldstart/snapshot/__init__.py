"""Snapshots of what a worker warmed up by serving, for its next life: KV of shared prefixes, and what steps take."""
