"""One short script per target."""
