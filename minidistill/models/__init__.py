"""The networks. Each file stands on torch (and layers.py) alone."""
