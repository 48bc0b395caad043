"""Convert published data sets to shards. Each layout has its own module.

converter.py        base class and settings of all converters
conversion.py       the conversion: reading, processes, writing and resuming
files.py tables.py  input files: compressed lines; rows of JSON, Parquet, CSV and TSV
image_store.py      images that are stored next to documents, in folders, tars and zips
url_lists.py        lists of URLs for img2dataset
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
"""Location of each converter, imported on use, because `kosmosg data --help` needs only the names."""
