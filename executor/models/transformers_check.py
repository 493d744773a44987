"""May a transformers model run on our pages? Refusals with their reason, and a proof by computing.

Owns the rules and the self-check at start: some tokens of two requests, in pieces and side by side, through the pages,
against the model's own eager attention on each request alone. What mixes tokens outside attention (convolutions,
recurrence), takes positions from elsewhere, or adds biases to scores cannot pass it. Must not know a family by name.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...protocol.errors import StartupError
from ..attention import EngineStep, dense_attention, engine_step
from .base import Model, ModelSpec
from .probe import probe_batch, probe_pages

log = logging.getLogger(__name__)

LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
DEFAULT_LENGTH = 2048
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention", "global", "local"}
BIASES = {"s_aux", "position_bias", "alibi", "head_mask", "attention_bias", "score_mod"}  # tensors that change scores
LONG, SHORT = 20, 5  # tokens of the two requests of the self-check; LONG needs a second block
CUT_LONG, CUT_SHORT = 12, 4  # where their first pieces end
TOLERANCE = 1e-3  # difference of the logits as a share of their spread
HALF = {torch.bfloat16: 0.1, torch.float16: 0.03}  # the same in coarser types


def refuse_unsupported(module: PreTrainedModel) -> None:
    """Raise `StartupError` for what is known from the class and its configuration alone."""
    name, config = type(module).__name__, module.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one for all layers, or by type
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    reason = None
    if getattr(module.config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder; only decoders are served"
    elif getattr(module, "_is_stateful", False):
        reason = (
            "it keeps a recurrent state (state space or linear attention), which pages of keys and values can't hold"
        )
    elif kinds:
        reason = f"its layers of type {sorted(kinds)} are not attention over keys and values"
    elif not getattr(module, "_supports_attention_backend", False):
        reason = "it does not attend through transformers' attention interface"
    elif "position_ids" not in inspect.signature(module.forward).parameters:
        reason = "its forward takes no position_ids (ALiBi or positions counted by its own cache)"
    elif any(part.get("rope_type") == "dynamic" for part in ropes):
        reason = "rope_type 'dynamic' makes positions depend on the longest request of a step"
    if reason is not None:
        raise StartupError(f"{name} can't be served: {reason}")


class Recorder(EngineStep):
    """A step that notes what each layer asks for, and attends densely over one request."""

    __slots__ = ("extras", "layers", "mask_windows", "windows")

    layers: list[tuple[int, int, int]]  # number, key/value heads, head size, in the order of the calls
    windows: set[int | None]  # what attention was asked to keep to
    mask_windows: set[int | None]  # what masks were made for
    extras: set[str]  # what only the model's own attention would heed

    def __init__(self) -> None:
        for name, value in (("layers", []), ("windows", set()), ("mask_windows", set()), ("extras", set())):
            object.__setattr__(self, name, value)  # an EngineStep is frozen

    def note_extras(self, module: torch.nn.Module, mask: Tensor | None, extras: dict[str, Any]) -> None:
        """Called for each layer with whatever came beside q, k and v."""
        if not hasattr(module, "layer_idx"):
            self.extras.add("no layer_idx")
        if mask is not None:
            self.extras.add("a mask of its own")
        self.extras.update(name for name, value in extras.items() if isinstance(value, Tensor) and name in BIASES)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int | None, soft_cap: float | None
    ) -> Tensor:
        self.layers.append((layer, k.shape[1], k.shape[2]))
        self.windows.add(window)
        return dense_attention(q, k, v, scale, window, soft_cap).flatten(1)


def run_module(
    module: PreTrainedModel, token_ids: Tensor, positions: Tensor, keep: Tensor | None, logits_at: Tensor | None
) -> Tensor:
    """Logits [M, V] float32 of the tokens `logits_at` [M] out of `token_ids` [T] (None: all). `keep`: the same rows,
    where the module can leave the others out by itself."""
    options = {} if keep is None else {"logits_to_keep": keep}
    out: Any = module(
        input_ids=token_ids[None], position_ids=positions[None], use_cache=False, return_dict=True, **options
    )
    logits: Tensor = out.logits[0]
    return (logits if keep is not None or logits_at is None else logits.index_select(0, logits_at)).float()


def checked_spec(module: PreTrainedModel) -> ModelSpec:
    """The shape of `module`, seen by running `SHORT` tokens. Raises `StartupError` for layers that do not fit pages."""
    name, config = type(module).__name__, module.config.get_text_config()
    seen, ids = Recorder(), _tokens(module, SHORT, 0)
    try:
        with torch.no_grad(), engine_step(seen):
            logits = run_module(module, ids, _places(ids), None, _places(ids))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        raise StartupError(f"{name} can't be served: its forward over one row of tokens raised {error!r}") from error
    numbers = [layer for layer, _, _ in seen.layers]
    shapes = {(heads, size) for _, heads, size in seen.layers}
    reason = None
    if seen.extras:
        reason = f"its attention takes {', '.join(sorted(seen.extras))}, which ours does not"
    elif not numbers or sorted(numbers) != list(range(len(numbers))):
        reason = f"not each of its layers attends once through the interface (it was called for {numbers[:8]})"
    elif len(numbers) < (getattr(config, "num_hidden_layers", None) or 0):
        reason = f"only {len(numbers)} of its {config.num_hidden_layers} layers attend through the interface"
    elif len(shapes) > 1:
        reason = f"its layers differ in key/value heads or head size: {sorted(shapes)}"
    elif not seen.mask_windows - {None} <= seen.windows:
        reason = (
            f"it limits attention to {sorted(filter(None, seen.mask_windows - seen.windows))} tokens by its mask only"
        )
    if reason is not None:
        raise StartupError(f"{name} can't be served: {reason}")
    ((heads, size),) = shapes
    return ModelSpec(
        architecture=name,
        num_layers=len(numbers),
        num_kv_heads=heads,
        head_dim=size,
        vocab_size=logits.shape[-1],
        max_model_len=_length(config, name),
        dtype=module.dtype,
    )


def verify(model: Model, module: PreTrainedModel, implementation: str) -> None:
    """Raise `StartupError` unless `model`, which wraps `module` with attention `implementation`, gives the logits that
    `module` gives with eager attention."""
    device = module.device
    long, short = _tokens(module, LONG, 1), _tokens(module, SHORT, 2)
    module.set_attn_implementation("eager")
    with torch.no_grad():
        expected = [run_module(module, ids, _places(ids), None, _places(ids)) for ids in (long, short)]
    module.set_attn_implementation(implementation)
    kv = probe_pages(model.spec, 2, device)
    first = probe_batch([(0, 0, CUT_LONG), (1, 0, CUT_SHORT)], device)
    second = probe_batch([(1, CUT_SHORT, SHORT - CUT_SHORT), (0, CUT_LONG, LONG - CUT_LONG)], device)
    with torch.no_grad():
        ids = torch.cat((long[:CUT_LONG], short[:CUT_SHORT]))
        got = model.forward(ids, first, kv, _places(ids))
        ids = torch.cat((short[CUT_SHORT:], long[CUT_LONG:]))
        more = model.forward(ids, second, kv, _places(ids))
    pieces = [got[:CUT_LONG], more[SHORT - CUT_SHORT :], got[CUT_LONG:], more[: SHORT - CUT_SHORT]]
    reference, result = torch.cat(expected), torch.cat(pieces)
    spread = (reference - reference.mean(-1, keepdim=True)).square().mean().sqrt()
    errors = (result - reference).square().mean(-1).sqrt() / spread.clamp_min(1e-12)
    exact = model.spec.dtype not in HALF
    # Rounding may send a token to another expert, and then its logits are others': three in four must agree.
    error = float(errors.max() if exact else errors.quantile(0.75))
    limit = TOLERANCE if exact else HALF[model.spec.dtype]
    if not error <= limit:
        raise StartupError(
            f"{model.spec.architecture} can't be served: with our attention its logits differ from its own by "
            f"{error:.2g} of their spread (limit {limit:g}); it mixes tokens or takes positions in a way of its own"
        )
    log.info("%s through transformers: logits within %.1e of its own attention", model.spec.architecture, error)


def _tokens(module: PreTrainedModel, count: int, seed: int) -> Tensor:
    """Token ids [count], the same each time; 0 to 2 are often padding and the like."""
    vocab: int = module.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(3, vocab - 1), vocab, (count,), generator=generator).to(module.device)


def _places(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[0], device=ids.device)


def _length(config: Any, name: str) -> int:
    """Positions that the model can take."""
    rope = getattr(config, "rope_parameters", None) or {}
    length = next((value for key in LENGTH_NAMES if (value := getattr(config, key, None))), None)
    if length is None:
        log.warning("%s names no %s: taking %d", name, " or ".join(LENGTH_NAMES[:2]), DEFAULT_LENGTH)
        return DEFAULT_LENGTH
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original and original < length:
        log.warning("%s: rope_type 'longrope' turns all positions at %d tokens: serving up to there", name, original)
        return int(original)
    return int(length)
