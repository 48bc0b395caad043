"""Make constructed samples from images (paper section 3.1, Fig. 4): caption → entities → masks → crops → shards.

    python -m datamodules.curation configs/curation/open_images.yaml [more.yaml | key=value …]

A stage is a plain class that maps batches of rows (`rows.py`). `stages.py` lists the stages and `run.py` runs them with
Ray Data. The unit of work is a chunk of the input, which becomes one shard.
"""
