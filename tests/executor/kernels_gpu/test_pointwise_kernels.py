"""Norms, activation, rotary positions and the gather of decode rows against the torch backend."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from fast_inference.executor.backends.base import KVLayer, StepBatch
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.kernels.gpu.norm import add_rms_norm, rms_norm
from fast_inference.executor.kernels.gpu.rope import rope_and_cache, write_kv
from fast_inference.executor.kernels.gpu.silu import silu_mul
from fast_inference.executor.slot_tensors import SlotTensors
from fast_inference.executor.step_kernels import step_kernels_unchecked
from fast_inference.executor.transfer import Transfer
from torch import Tensor

REFERENCE = TorchBackend()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def randn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype is expected.dtype
    bound = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=bound, atol=bound, equal_nan=True)


def check_norms(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    x, residual = (3 * randn(rows, size, dtype=dtype, device=device, seed=s) for s in (1, 2))
    weight = randn(size, dtype=dtype, device=device, seed=3)
    assert_close(rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    if dtype is torch.bfloat16:  # the interpreter cuts to it where a GPU rounds
        assert_close(total, x + residual)
    else:
        assert torch.equal(total, x + residual)
    assert_close(normed, REFERENCE.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), ((1, 1), (3, 64), (2, 576), (5, 1100)))
def test_norms_are_those_of_the_reference(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    check_norms(rows, size, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("size", (1024, 4096, 8192))
def test_norms_hold_at_real_sizes(size: int, cuda: torch.device) -> None:
    check_norms(300, size, torch.bfloat16, cuda)


def test_a_norm_of_a_transposed_tensor_is_that_of_its_rows(device: torch.device) -> None:
    x, weight = randn(48, 4, dtype=torch.float32, device=device).T, torch.ones(48, device=device)
    assert_close(rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x.contiguous(), weight, 1e-6))


def test_kernels_take_steps_without_tokens(device: torch.device) -> None:
    none = torch.empty((0, 64), device=device)
    assert rms_norm(none, torch.ones(64, device=device), 1e-5).shape == (0, 64)
    assert [part.shape for part in add_rms_norm(none, none, torch.ones(64, device=device), 1e-5)] == [(0, 64)] * 2
    assert silu_mul(none).shape == (0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), ((1, 1), (3, 100), (2, 1100)))
def test_the_activation_is_that_of_the_reference(
    rows: int, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    gate_up = 5 * randn(rows, 2 * size, dtype=dtype, device=device)
    assert_close(silu_mul(gate_up), REFERENCE.silu_mul(gate_up))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's word in the interpreter
def test_the_activation_has_no_overflow_at_the_ends_of_the_range(device: torch.device) -> None:
    gate = torch.tensor([-3e38, -1000.0, -100.0, 0.0, 100.0, 3e38], device=device)
    out = silu_mul(torch.cat((gate, torch.ones(6, device=device)))[None])
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 100.0, 3e38], device=device)
    torch.testing.assert_close(out[0], expected, atol=1e-6, rtol=1e-6)


def make_step(tokens: int, block_size: int, kv: KVLayer, device: torch.device) -> StepBatch:
    """Tokens at random positions and distinct random slots; only what rope and the cache look at is set."""
    generator = torch.Generator().manual_seed(7)
    slots = torch.randperm(kv.keys.shape[0] * block_size, generator=generator)[:tokens]
    none = torch.zeros(1, dtype=torch.int32, device=device)
    return StepBatch(
        positions=torch.randint(0, 50, (tokens,), generator=generator).to(device),
        slot_mapping=slots.to(device),
        block_tables=none,
        query_start=none,
        seq_lens=none,
        num_decodes=0,
        max_query_len=0,
        max_seq_len=0,
    )


def empty_layer(blocks: int, kv_heads: int, block_size: int, size: int, dtype: torch.dtype, device: torch.device):
    return KVLayer(*torch.full((2, blocks, kv_heads, block_size, size), math.nan, dtype=dtype, device=device))


def check_rope(
    tokens: int,
    heads: tuple[int, int],
    size: int,
    block_size: int,
    norms: tuple[bool, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    layers = [empty_layer(tokens // block_size + 3, heads[1], block_size, size, dtype, device) for _ in range(2)]
    batch = make_step(tokens, block_size, layers[0], device)
    qkv = randn(tokens, (heads[0] + 2 * heads[1]) * size, dtype=dtype, device=device)
    angles = torch.rand((50, size // 2), generator=torch.Generator().manual_seed(1)).to(device) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    q_norm, k_norm = (randn(size, dtype=dtype, device=device, seed=s) if has else None for s, has in enumerate(norms))
    expected = REFERENCE.rope_and_cache(qkv, cos_sin, layers[0], batch, q_norm, k_norm, 1e-6)
    mine = layers[1]
    q = rope_and_cache(qkv, cos_sin, mine.keys, mine.values, batch.positions, batch.slot_mapping, q_norm, k_norm, 1e-6)
    assert_close(q, expected)
    assert_close(mine.keys, layers[0].keys)
    assert torch.equal(mine.values.nan_to_num(9.0), layers[0].values.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "size", "block_size", "norms"),
    (
        ((4, 2), 64, 16, (False, False)),
        ((9, 3), 128, 16, (True, True)),
        ((1, 1), 80, 1, (True, False)),
        ((17, 1), 8, 8, (False, True)),
    ),
)
def test_heads_are_rotated_and_cached_as_by_the_reference(
    heads: tuple[int, int],
    size: int,
    block_size: int,
    norms: tuple[bool, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    check_rope(3, heads, size, block_size, norms, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("norms", ((False, False), (True, True)))
def test_rotation_holds_at_real_sizes(norms: tuple[bool, bool], cuda: torch.device) -> None:
    check_rope(3000, (32, 8), 128, 16, norms, torch.bfloat16, cuda)


def test_keys_and_values_are_written_as_they_are(device: torch.device) -> None:
    mine, reference = (empty_layer(4, 3, 8, 40, torch.float16, device) for _ in range(2))
    batch = make_step(5, 8, mine, device)
    k, v = (randn(5, 3, 40, dtype=torch.float16, device=device, seed=s) for s in (1, 2))
    write_kv(k, v, mine.keys, mine.values, batch.slot_mapping)
    REFERENCE.write_kv(k, v, reference, batch)
    for mine_part, wanted in ((mine.keys, reference.keys), (mine.values, reference.values)):
        assert torch.equal(mine_part.nan_to_num(9.0), wanted.nan_to_num(9.0))


@pytest.mark.parametrize("requests", (1, 3, 16))
def test_requests_are_admitted_as_torch_does_it(requests: int, device: torch.device) -> None:
    random = np.random.default_rng(requests)
    known, held = random.integers(1, 3000, requests), random.integers(0, 190, requests)
    slots = random.permutation(20)[:requests]
    token_rows, block_rows = ([random.integers(0, 999, n, np.int32) for n in rows] for rows in (known, held))
    floats = random.random((3, requests)).astype(np.float32)
    integers = random.integers(-(2**62), 2**62, (2, requests))
    pair = []
    for kernels in (step_kernels_unchecked(), None):
        tensors = SlotTensors(20, 3001, np.full((21, 190), 7, np.int32), 16, Transfer(device))
        tensors.kernels = kernels
        tensors.token_ids.fill_(5)
        tensors.admit(slots, token_rows, block_rows, floats, integers)
        pair.append(tensors)
    mine, expected = pair
    assert torch.equal(mine.token_ids, expected.token_ids)
    assert torch.equal(mine.lengths, expected.lengths)
    for slot, blocks in zip(slots.tolist(), block_rows, strict=True):
        assert mine.block_tables[slot].tolist() == [*blocks.tolist(), *[7] * (190 - len(blocks))]
    for column, wanted in zip(mine.all_draws, expected.all_draws, strict=True):
        assert torch.equal(column, wanted)


def test_slots_are_gathered_and_moved_on_as_torch_does_it(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    tables = torch.randint(0, 99, (7, 3), dtype=torch.int32, generator=generator)
    pair = []
    for kernels in (step_kernels_unchecked(), None):
        tensors = SlotTensors(6, 13, tables.numpy().copy(), 4, Transfer(torch.device("cpu")))
        tensors.kernels = kernels
        tensors.token_ids.copy_(torch.randint(0, 1000, (7, 13), generator=torch.Generator().manual_seed(4)))
        tensors.lengths.copy_(torch.tensor([1, 4, 5, 12, 8, 9, 1]))
        tensors.token_ids, tensors.lengths = tensors.token_ids.to(device), tensors.lengths.to(device)
        tensors.block_tables = tensors.block_tables.to(device)
        pair.append(tensors)
    for slots in ([5, 0, 3, 1], [2], [4, 6, 6]):
        where = torch.tensor(slots, device=device)
        mine, expected = (tensors.gather(where) for tensors in pair)
        assert expected.order is None and mine.order is not None
        assert mine.order.tolist() == torch.argsort(expected.lengths, descending=True, stable=True).tolist()
        for field in [field for field in fields(expected) if field.name != "order"]:
            part, wanted = getattr(mine, field.name), getattr(expected, field.name)
            if field.name == "seq_lens":  # nothing is to be attended for the slot that is nobody's
                wanted = torch.where(where == 6, 0, wanted).to(wanted.dtype)
            assert part.dtype is wanted.dtype
            assert torch.equal(part, wanted), field.name
        for tensors in pair:
            tensors.append(where, expected.lengths, torch.arange(7, 7 + len(slots), device=device))
        assert torch.equal(pair[0].lengths, pair[1].lengths)
        assert torch.equal(pair[0].token_ids[:6], pair[1].token_ids[:6])
