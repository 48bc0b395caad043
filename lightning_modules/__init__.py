"""The LightningModule of each training stage, and the training loop, checkpoints and sharding that they share."""
