"""Features of a benchmark's real side, kept in a file, so that later evaluations need not look at forty thousand photos
again.

Rows, not mean and covariance alone: KID and the miniature's small sets need them, and both follow from them in seconds.
A file is used only where all that its rows depend on is the same: protocol, data, network weights, and n.
"""

import re
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from evaluation.parallel.processes import Processes
from kosmosg.files import write_bytes

FEATURES = "features"
KEYS = ("protocol", "data", "weights", "n")


def reference_features(
    folder: Path,
    key: dict[str, str],
    compute: Callable[[], Tensor],
    console: Console,
    processes: Processes | None = None,
) -> Tensor | None:
    """The features N×F that `key` names, in the first process: read if they are kept in `folder`, else computed by all
    and kept.

    Args:
        key: `KEYS`: the protocol's identity, hashes of data and weights, and N.
    """
    processes = processes or Processes()
    file = folder / (re.sub(r"[^\w-]+", "-", key["protocol"]) + ".safetensors")
    features, reason = read_features(file, key) if processes.first and file.is_file() else (None, "")
    if processes.share(lambda: features is not None):
        return features
    if reason:
        console.print(f"The features of real images in '{file}' are not used ({reason}); they are computed anew.")
    features = compute()
    if processes.first:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(file, save({FEATURES: features.contiguous()}, metadata=key))
    return features


def read_features(file: Path, key: dict[str, str]) -> tuple[Tensor | None, str]:
    """The rows in a file; None, and why, where they are not those of `key` or the file is damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            found = stored.metadata() or {}
            if other := [name for name in KEYS if found.get(name) != key[name]]:
                return None, f"another {', '.join(other)}"
            features = stored.get_tensor(FEATURES)
    except (SafetensorError, OSError) as error:
        return None, f"unreadable: {error}"
    if features.dim() != 2 or len(features) != int(key["n"]):
        return None, f"rows of shape {tuple(features.shape)} for n={key['n']}"
    return features, ""
