"""Convert released checkpoints and Kosmos-2 to model folders, and back: `kosmosg convert`, `export` and `inspect`.

reader.py            load files of torch.save as data only
names.py             map released tensor names to those of kosmosg and back
weights.py           memory-mapped tensors of a part
checkpoint.py        stage, header, parts and sizes of a released checkpoint
parts.py             build and write the parts of a model folder
stable_diffusion.py  configurations and weights of the image decoder
convert.py           released checkpoint or OpenAI's CLIP → model folder
kosmos2.py           Kosmos-2 of transformers → model folder
export.py            model folder → released checkpoint
record.py            conversion.json, the model card and `kosmosg inspect`
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
