"""KOSMOS-G: prompts of interleaved images and text for a frozen image decoder (arXiv 2310.02992).

This package is what users of a model import: pipeline, prompts, networks, losses and checkpoint conversion.
"""
