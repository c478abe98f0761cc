"""One ResNet-18 recipe for CIFAR that trains the same on every device and world size."""

__version__ = "0.1.0"
