"""Which model is measured: a folder that engine and peers read alike.

Owns the command line's model options; must not know weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fast_inference import EngineConfig
from fast_inference.launch.models import ModelFinder
from peers import PEERS
from report import console

# SmolLM2-135M, the default model, as a shape: for `--load-format dummy` without a folder.
DUMMY_SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is loaded and how."""
    parser.add_argument("--model", default="", help="folder or hub name (default: the default model)")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--peer", action="append", default=[], choices=PEERS, help="may be given twice")
    parser.add_argument("--peer-batch", type=int, default=16, help="requests that generate takes at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")


@contextmanager
def model_folder(model: str, load_format: str) -> Iterator[str]:
    """The folder of the model that the options name. Raises `StartupError` if there is none."""
    if load_format == "dummy" and not model:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(DUMMY_SHAPE))
            yield folder
        return
    with console.status("looking for the model"):
        found = ModelFinder().find(EngineConfig(model=model), lambda progress: None)
    yield found.model


def vocabulary_size(folder: str) -> int:
    """As the model's configuration says."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])
