"""Published sets → shards of our samples: one module for each layout.

converter.py        what a converter is, and its settings
conversion.py       reads, converts in processes, writes; a restart continues after the last complete shard
files.py tables.py  input files: compressed lines; rows of JSON, Parquet, CSV and TSV
image_store.py      images beside the documents: in folders, tars and zips
url_lists.py        what img2dataset downloads
"""

CONVERTERS = {
    "captions": "datamodules.sources.captions:Captions",
    "instructions": "datamodules.sources.instructions:Instructions",
    "instructpix2pix": "datamodules.sources.instructpix2pix:InstructPix2Pix",
    "mmc4": "datamodules.sources.interleaved:Mmc4",
    "obelics": "datamodules.sources.interleaved:Obelics",
    "openimages": "datamodules.sources.openimages:OpenImages",
    "text": "datamodules.sources.text:Text",
    "tsv": "datamodules.sources.released_tsv:ReleasedTsv",
}
"""Where each converter is; imported when it is used, since `kosmosg data --help` needs the names alone."""
