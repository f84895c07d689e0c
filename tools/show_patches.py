"""Which patches of a picture a model keeps for a caption, layer by layer, beside the scores that it chose by.

Two captions of one picture stand side by side. Any finished run will do: selection has no parameters, so one that was
trained without it can be looked at with any.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from torch import Tensor

from sacl_ds.analysis.inputs import device_named
from sacl_ds.analysis.patches import draw, load_selecting, look
from sacl_ds.command_line import Parser, exit_status
from sacl_ds.config.room import user_path
from sacl_ds.data.images import BadImage
from sacl_ds.data.pictures import Picture
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError

EXAMPLE = """examples:
  python tools/show_patches.py runs/scenes-001 --scenes 0 3 7 --placement tower --layers 2 --out patches.png
  python tools/show_patches.py RUN --image a.jpg --captions 'a dog' 'the red door' --out patches.png"""
SCENES, SCENE_SEED = 500, 1001  # the held-out scenes of the built-in run


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, epilog=EXAMPLE, formatter_class=raw)
    parser.add_argument("run", type=user_path, metavar="RUN", help="finished run, or RUN/checkpoints/step_N")
    parser.add_argument("--image", type=user_path, action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument(
        "--scenes", type=int, nargs="+", default=[], metavar="N", help=f"built-in held-out scenes, below {SCENES}"
    )
    parser.add_argument(
        "--captions", nargs="+", action="append", default=[], metavar="TEXT",
        help="of all pictures; or one --captions for each, in order; scenes have their own two",
    )  # fmt: skip
    chosen = parser.add_argument_group("selection (default: the run's own)")
    chosen.add_argument("--placement", choices=["tower", "output", "published"])
    chosen.add_argument("--layers", type=int, nargs="+")
    chosen.add_argument("--keep-rate", type=float)
    chosen.add_argument("--guide", choices=["text", "cls", "random"])
    chosen.add_argument("--score", choices=["keys", "tokens"])
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--out", type=user_path, required=True, metavar="FILE.png")
    return parser.parse_args()


def pictures_and_captions(options: argparse.Namespace, size: int) -> tuple[list[Tensor], list[list[str]]]:
    """(3, size, size) uint8 each, and equally many captions for each. Raises UserError."""
    scenes, view = Scenes(SCENES, SCENE_SEED, size), CanonicalView(size)
    pictures, captions = [], []
    for number in options.scenes:
        if not 0 <= number < SCENES:
            raise UserError(f"--scenes {number}: there are {SCENES}, from 0 on")
        pictures.append(torch.from_numpy(scenes.image(number)).permute(2, 0, 1))
        captions.append([caption.text for caption in scenes.captions(number)[:2]])
    for file in options.image:
        try:
            pictures.append(view(Picture(file.read_bytes()), ()))
        except (OSError, BadImage) as error:
            raise UserError(
                f"--image {file}: {getattr(error, 'strerror', None) or error}; give a JPEG, PNG or WebP"
            ) from None
    if not pictures:
        raise UserError("no picture to look at; name some by --scenes 0 1 2 or --image FILE")
    given = options.captions
    if not given and options.image:
        raise UserError(f"--image {options.image[0]}: what does it show? Add --captions 'a text' 'another'")
    if given and len(given) not in (1, len(pictures)):
        raise UserError(f"{len(given)} --captions for {len(pictures)} pictures; give one, or one for each")
    if given:
        captions = given if len(given) == len(pictures) else given * len(pictures)
    if len({len(texts) for texts in captions}) > 1:
        raise UserError("--captions: give as many texts for one picture as for another")
    return pictures, captions


def main() -> None:
    options = arguments()
    names = ("placement", "layers", "keep_rate", "guide", "score")
    settings = [f"{name}={getattr(options, name)}" for name in names if getattr(options, name) is not None]
    device = device_named(options.device)
    model, tokenizer = load_selecting(options.run, settings)
    encoder = model.to(device).image_encoder
    pictures, captions = pictures_and_captions(options, encoder.vit.patch_embed.img_size[0])
    torch.manual_seed(0)  # of --guide random
    looked = [
        look(model, tokenizer, picture.to(device).expand(len(texts), -1, -1, -1), texts)
        for picture, texts in zip(pictures, captions, strict=True)
    ]
    used = encoder.selection
    title = (
        f"{options.run.resolve().name}: placement {used.placement}, keep_rate {used.keep_rate:g}, guide {used.guide}"
    )
    try:
        draw(looked, encoder.vit.patch_embed.patch_size[0], title, options.out)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise UserError(f"--out {options.out}: {str(error).splitlines()[0]}") from None


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        sys.exit(exit_status(main))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
