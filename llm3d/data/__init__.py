"""What training reads: formats of post-training data, packing, the order of samples, and the data sets."""
