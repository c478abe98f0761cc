"""Images on disk, and their way to a batch on the device."""
