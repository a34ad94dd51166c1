"""Images with captions: drawn (`scenes`) or from the disk (`folders`)."""
