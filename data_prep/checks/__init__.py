"""What `inspect` and `validate` find in a dataset, and how it is shown."""
