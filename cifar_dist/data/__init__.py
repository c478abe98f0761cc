"""Datasets, augmentation and batches."""
