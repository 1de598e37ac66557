"""Noise schedules, the table of modes, the loss and the sampler. A network is passed in as a function."""
