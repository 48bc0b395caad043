"""Constructed samples from images alone (paper section 3.1, Fig. 4): caption → entities → masks → crops → shards.

    python -m datamodules.curation configs/curation/open_images.yaml [more.yaml | key=value …]

A stage is a plain class on batches of rows (`rows.py`); `stages.py` lists them, Ray Data runs them (`run.py`). The
unit of work is a chunk of the input, which becomes one shard.
"""
