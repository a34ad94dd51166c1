"""The networks. Each file needs torch and at most layers.py: it can be copied out."""
