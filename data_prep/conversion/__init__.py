"""From a corpus to the training layout: cutting, assembly, statistics and the PCA codec."""
