"""Evaluation: protocols, image generation, metrics, the paper's tables and a report."""
