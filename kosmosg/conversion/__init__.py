"""Released checkpoints ↔ model folders: what `kosmosg convert`, `export` and `inspect` do.

reader.py      a file of torch.save as data alone
names.py       released names ↔ ours; state.py renames state dicts by them
sizes.py       shapes and header → constructor arguments
plan.py        the parts, checked against modules built without memory (parts.py)
convert.py     → a model folder; clip.py: a public CLIP → an image tower's folder
export.py      → a released checkpoint again
inspection.py  what a folder or file holds
"""

from kosmosg.conversion.convert import convert_checkpoint
from kosmosg.conversion.errors import ConversionError
from kosmosg.conversion.export import export_checkpoint
from kosmosg.conversion.inspection import inspect_model
from kosmosg.conversion.names import our_name, released_name
from kosmosg.conversion.reader import read_checkpoint
from kosmosg.conversion.state import Converted, convert_public_vision, convert_state

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
