"""Objects in buckets of Google Cloud Storage: a client with time limits and retries, and names that act as paths.

`uwm_jax.files` is the only module that knows which paths are remote; everything else goes through it.
"""
