"""From stored answers to scores, tables, plots and pages. Needs no cluster and no model.

Imports `jobs.disk` and `jobs.tasks`.
"""
