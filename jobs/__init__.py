"""Evaluation jobs: sweeps, calibration, latency, and the training of the bundled demo model."""
