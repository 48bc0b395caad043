"""Devices: batches, sharding, recomputing, the Trainer."""
