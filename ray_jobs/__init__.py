"""Ray over recipes: jobs that wait for a GPU (`ray_jobs.task`) and sweeps (`ray_jobs.sweep`)."""
