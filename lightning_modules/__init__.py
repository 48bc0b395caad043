"""One LightningModule per stage: what is trained, its step, its loss. The networks are injected."""
