"""Convert a released checkpoint, a Kosmos-2 of transformers or OpenAI's CLIP to a model folder.

    kosmosg convert checkpoint_final.pt models/kosmosg --dtype float16
    kosmosg convert checkpoint_stage2.pt models/aligned --decoder stable-diffusion-v1-5/stable-diffusion-v1-5
    kosmosg convert microsoft/kosmos-2-patch14-224 models/lm
    kosmosg convert ViT-L-14.pt models/vision

A released checkpoint needs sentencepiece.bpe.model and dict.txt, in its folder or given with --spm and --dict.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="OFFICIAL.pt", help="released checkpoint, state dict of OpenAI's CLIP, "
                        "or folder or hub id of a Kosmos-2")  # fmt: skip
    parser.add_argument("folder", metavar="OUT_DIR", help="model folder to write")
    parser.add_argument("--decoder", metavar="SD", help="Stable Diffusion folder or hub id for configurations, noise "
                        "schedule and weights that the checkpoint lacks")  # fmt: skip
    parser.add_argument("--spm", metavar="FILE", help="the released SentencePiece model")
    parser.add_argument("--dict", metavar="FILE", dest="dictionary", help="the released dictionary")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: as in the checkpoint")
    parser.add_argument("--vision-heads", type=int, metavar="N", help="vision encoder heads; default: width / 64")
    parser.add_argument("--aligner-heads", type=int, metavar="N", help="AlignerNet heads; default: width / 64")
    parser.add_argument("--keep-grounding", action="store_true", help="keep Kosmos-2's grounding tokens")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT_DIR once the new folder is complete")


def run(arguments: argparse.Namespace) -> int:
    from kosmosg.conversion import convert_checkpoint
    from kosmosg.conversion.record import summary

    options = {name: value for name, value in vars(arguments).items() if name not in ("checkpoint", "folder", "run")}
    record = convert_checkpoint(arguments.checkpoint, arguments.folder, **options)
    print(summary(record))
    print(f"written to '{arguments.folder}'")
    return 0
