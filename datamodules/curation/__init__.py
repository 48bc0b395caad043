"""Constructed samples from images alone (paper section 3.1, Fig. 4): caption → entities → masks → crops → shards.

    python -m datamodules.curation configs/curation/open_images.yaml [more.yaml | key=value …]

A stage is a class on batches of rows (`rows.py`). The unit of work is a chunk of the input, which becomes one shard
(`chunks.py`, `work.py`); an engine only says who works on which chunk (`local_engine.py`, `ray_engine.py`), so the
shards do not depend on it.
"""
