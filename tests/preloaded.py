"""What every process that `forked.py` starts has imported already. Nothing here computes: a fork must find one thread."""

import contextlib
import importlib
import os

# Read by libraries when they are imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

MODULES = (
    "accelerate", "timm", "torch.distributed.checkpoint", "torch.utils.data", "torch.utils.flop_counter",
    "transformers.models.bert.modeling_bert", "jinja2", "matplotlib.pyplot", "nltk.lm", "scipy.stats", "fastapi", "uvicorn",
    "clipvisionalign.cli", "clipvisionalign.models.aligner", "clipvisionalign.retrieval", "clipvisionalign.training.train",
    "clipvisionalign.study.runner", "clipvisionalign.search.indexer", "clipvisionalign.search.searcher",
    "clipvisionalign.search.server.run", "datasets", "peft", "webdataset",
)  # fmt: skip

for name in MODULES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

# transformers compiles some hundred patterns before the first model that it loads, and keeps them.
with contextlib.suppress(ImportError):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("bert")
