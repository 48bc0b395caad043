"""Make constructed samples from images: python -m datamodules.curation curation.yaml [more.yaml | key=value …]

Arguments are YAML files or key=value; later ones override earlier ones. Resumable: finished chunks are skipped.

    python -m datamodules.curation configs/curation/open_images.yaml input.images=/data/open-images
    python -m datamodules.curation configs/curation/open_images.yaml ray.address=auto
    python -m datamodules.curation configs/curation/toyland.yaml
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the libraries are imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import; failures are reported by our own loaders
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
from collections.abc import Sequence

from rich.console import Console

from datamodules.curation.config import Curation
from datamodules.curation.run import curate
from datamodules.errors import DataError
from kosmosg.config import ConfigError, describe_schema, load_config, written_config


def main(arguments: Sequence[str]) -> int:
    """Return the exit status: 0 finished, 2 invalid arguments or folders, 130 after Ctrl-C, 143 after SIGTERM."""
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        print(describe_schema(Curation))
        return 0 if arguments else 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, which ends the workers
    try:
        curate(load_config(arguments, Curation), Console(), written_config(arguments, Curation))
    except (ConfigError, DataError) as error:
        print(f"datamodules.curation: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command continues with the unfinished chunks.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore SIGINT in background jobs
    sys.exit(main(sys.argv[1:]))
