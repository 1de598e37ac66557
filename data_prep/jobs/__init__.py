"""What every long job of `data_prep` stands on: folders that continue, outputs that appear whole, worker processes."""
