"""The embedded miniature Stable Diffusion: scenes as training data, a judge of their images, and the weights."""
