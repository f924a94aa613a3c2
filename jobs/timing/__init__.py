"""How long prompts and their answers take: who is timed, on what, and the rounds. Imports `jobs.disk`."""
