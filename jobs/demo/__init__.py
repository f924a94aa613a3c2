"""What `jobs.train_demo` makes the bundled demo model from. Imports `jobs.tasks`."""
