"""Encoders, metrics, confidence intervals and results."""
