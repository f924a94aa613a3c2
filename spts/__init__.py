"""SPTS: self-predictive token skipping for long-prompt prefill."""
