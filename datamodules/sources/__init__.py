"""From what the authors of a set publish to shards of our samples: one module for each published layout.

layouts.py          the table of layouts
conversion.py       reading, working in processes, writing; resumed at the last complete shard
files.py tables.py  input files: compressed lines, JSON, Parquet, CSV
image_store.py      images beside the documents: folders and tars
download.py         images by URL, politely
"""
