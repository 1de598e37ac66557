"""What a training step needs and costs on devices that this machine does not have."""
