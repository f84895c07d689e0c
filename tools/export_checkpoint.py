"""A run as a folder that others load: the two towers for transformers, or the whole model in one safetensors file.

Any ZeRO stage, any number of ranks; nothing is written in place, and nothing is overwritten.
"""

from __future__ import annotations

import argparse
import os
import sys

from sacl_ds.command_line import Parser, exit_status
from sacl_ds.config.room import user_path

FORMS = {
    "hf": "both towers as transformers' ChineseCLIPModel, for AutoModel and pipelines, without this package",
    "safetensors": "the whole model, for sacl_ds.load, fine-tuning and further pre-training",
}
EXAMPLE = """examples:
  python tools/export_checkpoint.py runs/shards-001 --to hf --out exported/towers
  python tools/export_checkpoint.py RUN/checkpoints/step_00020000 --to safetensors --dtype bf16 --out exported"""


def arguments() -> argparse.Namespace:
    forms = "\n".join(f"  {name:<12} {what}" for name, what in FORMS.items())
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=f"{__doc__}\nforms:\n{forms}", epilog=EXAMPLE, formatter_class=raw)
    parser.add_argument("run", metavar="RUN", help="directory of a finished run, or RUN/checkpoints/step_N")
    parser.add_argument("--to", choices=list(FORMS), required=True, help="form")
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="folder that is not there yet")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # all on the CPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from sacl_ds.exporting import export

    for line in export(options.run, options.to, options.out, options.dtype):
        print(line)


if __name__ == "__main__":
    sys.exit(exit_status(main))
