"""Evaluation: protocols, generation to a manifest, encoders, metrics, the paper's tables and a report."""
