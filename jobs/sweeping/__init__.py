"""From a sweep's configuration to its answers: cells, prompts, the queue, what is shown meanwhile.

Imports `jobs.reporting` and what lies below it.
"""
