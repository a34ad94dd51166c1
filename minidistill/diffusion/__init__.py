"""The mathematics of diffusion: noise schedules, samplers, sampling settings, seeded noise."""
