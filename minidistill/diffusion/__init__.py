"""The maths of noise: schedules and conversions (`schedule`), solvers and guidance (`samplers`)."""
