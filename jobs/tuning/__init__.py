"""A schedule for a model: the search for one, and the verdict on one.

Imports `jobs.sweeping` and what lies below it.
"""
