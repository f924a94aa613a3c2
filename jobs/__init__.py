"""Evaluation jobs: sweeps, calibration, latency, and the training of the bundled demo model.

The modules here are run (`python -m jobs.sweep`) or shared by those that are; the packages are their parts.
"""
