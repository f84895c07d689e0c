"""What the server that tests fork processes from (`ranks.prepared`) has imported: also what runs and tools import late.

pyarrow's first table loads pandas; matplotlib's first picture finds its fonts.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from sacl_ds.telemetry.plots import plot_run

for _name in (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.pin_memory",
    "functorch.compile",
    "hypothesis",
    "matplotlib.backends.backend_agg",
    "matplotlib.font_manager",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "pyarrow.parquet",
    "pytest",
    "quick_interpreter",
    "pandas",
    "rich.progress",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.utils.cpp_extension",
    "torch.utils.flop_counter",
    "sacl_ds.command_line",
    "sacl_ds.config_help",
    "sacl_ds.evaluation.held_out",
    "sacl_ds.evaluation.retrieval",
    "sacl_ds.model.cost",
    "sacl_ds.training.checkpoint",
    "sacl_ds.training.pretrain",
    "sacl_ds.training.records",
    "tiny",
):
    import_module(_name)
# what `engine.start_process` does before DeepSpeed joins: it would compile for a minute where a test calls it itself
sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
with tempfile.TemporaryDirectory() as _folder:
    _figures = dict.fromkeys(("loss", "itc", "itm", "mlm", "pmi_positive", "infonce_bound"), 1.0)
    _judged = {"text_to_image_R@1": 0.5, "mean_recall": 0.5}
    _lines = {"step": 1, **_figures}, {"step": 1, "evaluation": _judged, "chance": _judged}
    Path(_folder, "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in _lines))
    plot_run(Path(_folder))
gc.collect()
gc.freeze()  # a collection in a forked process would walk all of it, and copy its pages
