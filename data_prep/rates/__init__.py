"""What `data_prep.benchmark` measures."""
