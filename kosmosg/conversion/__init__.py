"""Released checkpoints and Kosmos-2 ↔ model folders: what `kosmosg convert`, `export` and `inspect` do.

reader.py      a file of torch.save as data alone
names.py       released names ↔ ours, and state dicts renamed by them
weights.py     the tensors of a part, mapped from their file
checkpoint.py  a released checkpoint: stage, header, parts, sizes
parts.py       the parts of a model folder, built without memory; stable_diffusion.py those of the image decoder
convert.py     → a model folder; kosmos2.py from Kosmos-2 as transformers keeps it
export.py      → a released checkpoint again
record.py      what is said of a conversion, and what a folder or file holds
"""

from kosmosg.conversion.convert import convert_checkpoint
from kosmosg.conversion.export import export_checkpoint
from kosmosg.conversion.names import Converted, convert_public_vision, convert_state, our_name, released_name
from kosmosg.conversion.reader import ConversionError, read_checkpoint
from kosmosg.conversion.record import inspect_model

__all__ = [
    "ConversionError",
    "Converted",
    "convert_checkpoint",
    "convert_public_vision",
    "convert_state",
    "export_checkpoint",
    "inspect_model",
    "our_name",
    "read_checkpoint",
    "released_name",
]
