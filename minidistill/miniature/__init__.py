"""The embedded miniature Stable Diffusion: its world of scenes, the judge of their images, and its weights."""
