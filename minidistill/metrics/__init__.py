"""Metrics: compute and memory cost, CLIP score, reconstruction."""
