"""Run folders, checkpoints, exports and sweeps."""
