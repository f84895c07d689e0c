"""A sheet of built-in scenes with their captions and how many held-out pictures each caption is true of.

python tools/show_scenes.py --count 8 --out scenes.png
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sacl_ds.config.room import user_path
from sacl_ds.data.scenes import Scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=1001, help="default: %(default)s, the held-out scenes of the built-in run"
    )
    parser.add_argument("--image-size", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--out", type=user_path, required=True)
    options = parser.parse_args()
    scenes = Scenes(500, options.seed, options.image_size)
    true_of = (scenes.relevance() == 1).sum(1).reshape(500, -1)
    columns = 4
    rows = -(-options.count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.3 * columns, 3.0 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, axis in zip(range(options.count), axes.flat, strict=False):
        captions = [f"{c.text}  [{n}]" for c, n in zip(scenes.captions(index), true_of[index], strict=True)]
        axis.imshow(scenes.image(index), interpolation="nearest")
        axis.set_title("\n".join(captions), fontsize=7, loc="left")
    figure.suptitle("[n]: pictures out of 500 that the caption is true of", fontsize=8)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
