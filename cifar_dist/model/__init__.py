"""Networks, layers and optimizers."""
