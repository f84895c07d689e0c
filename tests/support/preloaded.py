"""What the server that tests fork processes from (`ranks.prepared`) has imported: also what runs and tools import late.

DeepSpeed's check of the optimizer compiles a function, for which torch loads inductor; pyarrow's first table loads
pandas.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module

for _name in (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.pin_memory",
    "functorch.compile",
    "matplotlib.backends.backend_agg",
    "matplotlib.font_manager",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "pyarrow.parquet",
    "pandas",
    "rich.progress",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.utils.cpp_extension",
    "torch.utils.flop_counter",
    "sacl_ds.command_line",
    "sacl_ds.config_help",
    "sacl_ds.evaluation.held_out",
    "sacl_ds.telemetry.plots",
    "sacl_ds.training.pretrain",
    "tiny",
):
    import_module(_name)
# what `engine.start_process` does before DeepSpeed joins: it would compile for a minute where a test calls it itself
sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
gc.collect()
gc.freeze()  # a collection in a forked process would walk all of it, and copy its pages
