"""Samples, shards, and one LightningDataModule per stage."""
