"""The Triton attention kernels against the torch reference: in Triton's interpreter, or on a device if there is one.

The interpreter takes tenths of a second a step: shapes are small here, and real ones are in `test_attention_on_hopper`.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..random_step import attend, make_step

pytest.importorskip("triton")

from fast_inference.executor.backends import hopper_attention as hopper
from fast_inference.executor.backends import triton
from fast_inference.executor.backends.base import KVLayer
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.backends.triton import TritonBackend
from fast_inference.executor.kernels.gpu import (
    attention_decode,
    attention_hopper,
    attention_hopper_decode,
    attention_prefill,
    attention_splits,
)
from fast_inference.executor.kernels.gpu.attention_tiles import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
MIXED = [(1, 0), (1, 140), (5, 0), (45, 60)]


@pytest.fixture(autouse=True)
def seed(one_thread: None) -> None:
    torch.manual_seed(0)


def assert_as_torch(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int] = (3, 1),
    head_size: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    soft_cap: float | None = None,
) -> None:
    """`heads`: query heads per kv head, kv heads."""
    step = make_step(lengths, heads[1], block_size, head_size, dtype).to(DEVICE)
    q = torch.randn(len(step.batch.positions), heads[0] * heads[1], head_size).to(DEVICE, dtype)
    actual = attend(TritonBackend(), q, step, head_size**-0.5, window, soft_cap)
    assert_near(actual, attend(TorchBackend(), q, step, head_size**-0.5, window, soft_cap))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype is expected.dtype and actual.shape == expected.shape
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head_size", (64, 80, 96, 128, 256))
def test_a_mixed_step_attends_as_the_reference_does_for_every_head_size(head_size: int) -> None:
    assert_as_torch([(1, 5), (1, 130), (20, 50)], head_size=head_size)


@pytest.mark.parametrize(("window", "soft_cap"), ((None, None), (30, 5.0)))
def test_half_precision_is_near_the_reference(window: int | None, soft_cap: float | None) -> None:
    assert_as_torch(MIXED, head_size=40, dtype=torch.float16, window=window, soft_cap=soft_cap)


@pytest.mark.parametrize("heads", ((1, 2), (4, 2), (7, 1), (17, 1)))
def test_groups_of_any_size_share_a_tile(heads: tuple[int, int]) -> None:
    assert_as_torch(MIXED, heads=heads)


@pytest.mark.parametrize("block_size", (1, 8, 24, 128))
def test_tiles_are_gathered_over_blocks_of_any_size(block_size: int) -> None:
    assert_as_torch(MIXED, block_size=block_size)


@pytest.mark.parametrize("window", (1, 20, 64, 65, 1000))
def test_a_window_hides_what_lies_before_it(window: int) -> None:
    assert_as_torch(MIXED, window=window)


@pytest.mark.parametrize(("window", "soft_cap"), ((None, 50.0), (70, 2.0)))
def test_scores_are_capped_softly(window: int | None, soft_cap: float) -> None:
    assert_as_torch(MIXED, window=window, soft_cap=soft_cap)


@pytest.mark.parametrize("length", (63, 64, 65, 128, 129))
def test_lengths_around_the_edge_of_a_tile_leave_nothing_out(length: int) -> None:
    assert_as_torch([(1, length - 1), (length, 0), (42, length)], heads=(1, 1))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 60)), st.integers(0, 90)), min_size=1, max_size=5),
    heads=st.sampled_from(((1, 1), (3, 1), (1, 2), (4, 2))),
    block_size=st.sampled_from((4, 16)),
    head_size=st.sampled_from((16, 40, 64)),
    window=st.one_of(st.none(), st.integers(1, 60)),
    soft_cap=st.one_of(st.none(), st.floats(0.5, 50.0)),
)
def test_random_steps_attend_as_the_reference_does(
    seed, lengths, heads, block_size, head_size, window, soft_cap
) -> None:
    torch.manual_seed(seed)
    assert_as_torch(lengths, heads, head_size, block_size, torch.float32, window, soft_cap)


@pytest.mark.parametrize("window", (None, 100))
def test_rows_cut_into_any_number_of_parts_give_the_same(window: int | None) -> None:
    step = make_step([(1, 0), (1, 127), (1, 330)], 1, 16, 16, torch.float32).to(DEVICE)
    q = torch.randn(3, 2, 16).to(DEVICE)
    expected = attend(TorchBackend(), q, step, 0.3, window, None)
    kv = step.copy_of_kv()
    TorchBackend().write_kv(step.fresh(step.keys), step.fresh(step.values), kv, step.batch)
    for splits in (1, 3, 8):  # with 8, every row has parts without a token
        out = torch.full_like(expected, torch.nan)
        attention_decode.decode_attention(q, kv, step.batch, 0.3, out, window, None, splits)
        assert_near(out, expected)


@pytest.mark.parametrize("splits", (1, 3))
def test_a_row_without_tokens_gives_zeros(splits: int) -> None:
    """The padding of a CUDA graph may be such a row."""
    step = make_step([(1, 0), (1, 70)], 1, 16, 16, torch.float32).to(DEVICE)
    step.batch.seq_lens[0] = 0
    kv = KVLayer(*(torch.nan_to_num(pages, 1.0) for pages in (step.kv.keys, step.kv.values)))
    out = torch.full((2, 32), torch.nan, device=DEVICE)
    attention_decode.decode_attention(torch.randn(2, 2, 16).to(DEVICE), kv, step.batch, 0.3, out, splits=splits)
    assert out[0].eq(0).all() and out[1].isfinite().all()


def test_two_rows_may_share_the_blocks_of_a_prefix() -> None:
    step = make_step([(1, 40), (1, 40), (9, 33)], 2, 16, 16, torch.float32)
    step.batch.block_tables[1:, :2] = step.batch.block_tables[0, :2]
    step = step.to(DEVICE)
    q = torch.randn(11, 4, 16).to(DEVICE)
    assert_near(attend(TritonBackend(), q, step, 0.1, None, None), attend(TorchBackend(), q, step, 0.1, None, None))


@pytest.mark.parametrize("tile", (Tile(16, 16, 4, 2), Tile(128, 128, 8, 2)))
def test_the_tile_changes_nothing(tile: Tile) -> None:
    step = make_step([(40, 30), (20, 0)], 1, 16, 16, torch.float32).to(DEVICE)
    q = torch.randn(60, 3, 16).to(DEVICE)
    kv = step.copy_of_kv()
    expected = attend(TorchBackend(), q, step, 0.3, 30, None)
    TorchBackend().write_kv(step.fresh(step.keys), step.fresh(step.values), kv, step.batch)
    out = torch.full_like(expected, torch.nan)
    attention_prefill.prefill_attention(q, kv, step.batch, 0.3, out, 30, None, None, tile)
    assert_near(out, expected)


@pytest.mark.parametrize("window", (None, 70))
@pytest.mark.parametrize("splits", (2, 8))
def test_a_chunk_behind_a_long_prefix_is_cut_along_its_keys(window: int | None, splits: int) -> None:
    step = make_step([(1, 3), (3, 200), (20, 5), (9, 120)], 1, 16, 16, torch.float32).to(DEVICE)
    q = torch.randn(33, 2, 16).to(DEVICE)
    expected = attend(TorchBackend(), q, step, 0.3, window, None)
    kv = step.copy_of_kv()
    TorchBackend().write_kv(step.fresh(step.keys), step.fresh(step.values), kv, step.batch)
    out = torch.full_like(expected, 7.0)
    attention_prefill.prefill_attention(q, kv, step.batch, 0.3, out, window, None, splits, Tile(32, 32, 4, 2))
    assert out[0].eq(7.0).all()  # the decode row is another kernel's
    assert_near(out[1:], expected[1:])


@pytest.mark.parametrize("window", (None, 100))
def test_the_width_of_the_block_table_changes_no_bit_of_a_decode(window: int | None) -> None:
    """A CUDA graph has the widest table, a step without one a table as wide as its longest row."""
    step = make_step([(1, 200), (1, 30)], 1, 16, 16, torch.float32).to(DEVICE)
    q = torch.randn(2, 2, 16).to(DEVICE)
    expected = attend(TritonBackend(), q, step, 0.3, window, None)
    wider = torch.cat((step.batch.block_tables, torch.zeros_like(step.batch.block_tables).repeat(1, 40)), 1)
    wide = replace(step, batch=replace(step.batch, block_tables=wider, max_seq_len=10_000))
    assert torch.equal(attend(TritonBackend(), q, wide, 0.3, window, None), expected)


@given(
    programs=st.integers(1, 4096),
    resident=st.integers(1, 1000),
    longest=st.integers(1, 2**20),
    least=st.integers(16, 512),
)
def test_rows_are_cut_to_fill_the_device_but_not_into_less_than_is_worth_it(
    programs: int, resident: int, longest: int, least: int
) -> None:
    splits = attention_splits.choose_splits(programs, resident, longest, least)
    assert 1 <= splits <= attention_splits.MAX_SPLITS
    assert splits == 1 or (splits * programs <= resident and splits * least <= longest)


@given(group=st.integers(1, 128), head_size=st.integers(8, 256), itemsize=st.sampled_from((2, 4)))
def test_a_tile_holds_a_group_and_fits_into_shared_memory(group: int, head_size: int, itemsize: int) -> None:
    head_bytes = itemsize * (1 << (head_size - 1).bit_length())
    for choose in (attention_decode.choose_tile, attention_prefill.choose_tile):
        tile = choose(group, head_size, itemsize)
        assert tile.rows >= max(group, 16)
        in_flight = 2 * tile.keys * head_bytes * (tile.stages - 1)
        assert in_flight + tile.rows * head_bytes <= 227 << 10


def test_what_the_kernels_cannot_do_is_done_by_torch_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    step = make_step([(1, 5), (3, 5)], 1, 16, 16, torch.float64).to(DEVICE)
    q = torch.randn(4, 2, 16, dtype=torch.float64).to(DEVICE)
    backend = TritonBackend()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            actual = attend(backend, q, step, 0.3, None, None)
    assert torch.equal(actual, attend(TorchBackend(), q, step, 0.3, None, None))
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "float64" in caplog.text


def test_all_variants_of_a_kernel_are_compiled_at_its_first_step() -> None:
    backend = TritonBackend()
    assert backend._splits("decode", "float16", True) == (1, 2, None)
    assert backend._splits("decode", "float16", True) == (None,)
    assert backend._splits("prefill", "float16", True) == (1, 2, None)


def test_what_no_backend_could_do_is_refused() -> None:
    step = make_step([(1, 5)], 2, 16, 16, torch.float32).to(DEVICE)
    attention = TritonBackend().attention
    with pytest.raises(ValueError, match="does not fit"):
        attention(torch.randn(1, 3, 16, device=DEVICE), step.kv, step.batch, 0.3)
    with pytest.raises(ValueError, match="float16"):
        attention(torch.randn(1, 4, 16, device=DEVICE).half(), step.kv, step.batch, 0.3)
    with pytest.raises(ValueError, match="scale must be over 0"):
        attention(torch.randn(1, 4, 16, device=DEVICE), step.kv, step.batch, 0.0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size", "dtype", "window", "soft_cap", "fit"),
    (
        (32, 8, 128, 16, torch.bfloat16, None, None, True),
        (28, 4, 128, 48, torch.float16, None, None, True),
        (20, 4, 128, 16, torch.bfloat16, None, None, True),
        (64, 1, 128, 16, torch.bfloat16, None, None, True),
        (72, 8, 128, 16, torch.bfloat16, None, None, False),  # 9 of 16 rows
        (128, 1, 128, 16, torch.bfloat16, None, None, False),
        (32, 8, 128, 8, torch.bfloat16, None, None, False),
        (32, 8, 64, 16, torch.bfloat16, None, None, False),
        (32, 8, 128, 16, torch.float32, None, None, False),
        (32, 8, 128, 16, torch.bfloat16, 100, None, False),
        (32, 8, 128, 16, torch.bfloat16, None, 30.0, False),
    ),
)
def test_the_kernel_for_hopper_is_asked_for_the_shapes_it_has(
    heads: int,
    kv_heads: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
    soft_cap: float | None,
    fit: bool,
) -> None:
    kv = KVLayer(*torch.zeros(2, 1, kv_heads, block_size, head_size, dtype=dtype).unbind())
    q = torch.zeros(1, heads, head_size, dtype=dtype)
    assert attention_hopper.fits(q, kv, window, soft_cap) is fit


def test_the_kernel_for_hopper_is_asked_only_for_long_prompts_and_much_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def pays(*lengths: tuple[int, int], heads: int = 32) -> bool:
        step = make_step(list(lengths), 8, 16, 8, torch.float16)
        return attention_hopper.pays(torch.zeros(len(step.batch.positions), heads, 8), step.kv, step.batch)

    monkeypatch.setattr(attention_hopper, "processors", lambda device: 100)
    assert pays((800, 0)) and pays((1, 50), (1, 50), (1000, 100), (100, 0))  # 25 tiles of 32 tokens for each kv head
    assert not pays((799, 0)) and not pays((800, 0), heads=16) and not pays(*[(500, 0)] * 4)


def test_the_decode_kernel_for_hopper_is_for_rows_that_fill_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def pays(rows: int, kv_heads: int) -> bool:
        step = make_step([(1, 0)] * rows, kv_heads, 16, 16, torch.float16)
        return attention_hopper_decode.pays(torch.empty(0), step.kv, step.batch)

    monkeypatch.setattr(attention_hopper_decode, "processors", lambda device: 132)
    assert pays(9, 8) and pays(5, 16) and pays(33, 2)  # rounded up to a power of two, two parts of each
    assert not pays(8, 8) and not pays(4, 16) and not pays(32, 2)


@pytest.mark.parametrize(
    ("does", "told"),
    (("as it should", ""), ("something else", "differs from it by"), ("not compile", "RuntimeError: no such layout")),
)
def test_the_kernel_for_hopper_is_tried_once_against_the_other(
    does: str, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def attend_on_hopper(q, kv, batch, scale, out) -> None:
        calls.append(out)
        if does == "not compile":
            raise RuntimeError("no such layout")
        attention_prefill.prefill_attention(q, kv, batch, scale, out)
        if does == "something else":
            out[-1, -1] += 1.0

    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    prompts = replace(hopper.PROMPTS, attend=attend_on_hopper, pays=lambda q, kv, batch: True)
    decodes = replace(hopper.DECODES, fits=lambda q, kv, window, soft_cap: False)
    monkeypatch.setattr(triton, "PROMPTS", prompts)
    monkeypatch.setattr(triton, "DECODES", decodes)
    step = make_step([(1, 5), (20, 8)], 1, 16, 128, torch.float16).to(DEVICE)
    q = torch.randn(21, 2, 128).to(DEVICE, torch.float16)
    backend = TritonBackend()
    for _ in range(2):
        assert_near(attend(backend, q, step, 0.1, None, None), attend(TorchBackend(), q, step, 0.1, None, None))
    assert len(calls) == (3 if does == "as it should" else 1)
    assert len(caplog.records) == bool(told) and told in caplog.text


@pytest.mark.parametrize("splits", (1, 2))
def test_the_order_in_which_decode_rows_are_taken_changes_no_bit(splits: int) -> None:
    step = make_step([(1, before) for before in (3, 90, 40, 0)], 2, 16, 16, torch.float32).to(DEVICE)
    q = torch.randn(4, 4, 16, device=DEVICE)
    TorchBackend().write_kv(step.fresh(step.keys), step.fresh(step.values), step.kv, step.batch)
    results = []
    for order in (None, torch.tensor([1, 2, 0, 3], dtype=torch.int32, device=DEVICE)):
        out = q.new_full((4, 4 * 16), torch.nan)
        attention_decode.decode_attention(q, step.kv, replace(step.batch, order=order), 0.25, out, splits=splits)
        results.append(out)
    assert torch.equal(*results) and not results[0].isnan().any()


@pytest.mark.parametrize("splits", (1, 2))
def test_a_prompt_row_without_tokens_is_passed_over(splits: int) -> None:
    """As the padding of a recorded step has them: in front, between others and at the end."""
    step = make_step([(5, 20), (17, 3)], 1, 16, 16, torch.float32).to(DEVICE)
    q = torch.randn(22, 2, 16, device=DEVICE)
    TorchBackend().write_kv(step.fresh(step.keys), step.fresh(step.values), step.kv, step.batch)
    tables = step.batch.block_tables
    starts = torch.tensor([0, 0, 5, 5, 22, 22, 22], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([0, 25, 0, 20, 0, 0], dtype=torch.int32, device=DEVICE)
    padded = replace(step.batch, query_start=starts, seq_lens=lens, block_tables=tables[[0, 0, 0, 1, 0, 0]])
    results = []
    for batch in (step.batch, padded):
        out = q.new_full((22, 2 * 16), torch.nan)
        attention_prefill.prefill_attention(q, step.kv, batch, 0.25, out, splits=splits)
        results.append(out)
    assert torch.equal(*results) and not results[0].isnan().any()
    torch.testing.assert_close(TorchBackend().attention(q, step.kv, padded, 0.25), results[0], rtol=2e-5, atol=2e-5)
