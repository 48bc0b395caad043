"""Write the VAE's moments beside shards: python -m datamodules.moments [more.yaml | key=value …]

    python -m datamodules.moments shards='data/constructed/*.tar' \\
        image_decoder=stable-diffusion-v1-5/stable-diffusion-v1-5 image_size=512

Then data.kept_moments=true lets stage 3 read them and decode no target image. Shards that have theirs are passed over,
so the same command goes on where it was stopped. A sample of 512 px takes 131 kB, half of it with precision=float16.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while the libraries load ends quietly: nothing has begun
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from collections.abc import Sequence

from datamodules.errors import DataError
from datamodules.moments.writing import MomentsConfig, write_moments
from kosmosg.config import ConfigError, load_config


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 written, 2 a mistake in the arguments or the data, 130 after Ctrl-C."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0 if arguments else 2
    try:
        counts = write_moments(load_config(arguments, MomentsConfig))
    except (ConfigError, DataError, OSError) as error:
        print(f"datamodules.moments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on with the shard it was at.", file=sys.stderr)
        return 130
    print(
        f"{counts.shards} shards written, {counts.there} were there; {counts.samples} samples, {counts.bad} unusable."
    )
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
