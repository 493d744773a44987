"""What transformers' `generate` says, greedily, and how somebody else's tokens compare with it.

Owns the reference and the rule for near-ties; must not know engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, PreTrainedModel

NEAR_TIE = 1e-4  # two logits closer than this may change places
PAD_TOKEN = 0


@dataclass(frozen=True, slots=True)
class Reference:
    """The tokens for one prompt, and at each of them how far the best logit was from the second."""

    tokens: list[int]
    gaps: list[float]


def greedy_reference(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_tokens: int, padded_tokens: int = 0
) -> list[Reference]:
    """`max_tokens` tokens for each prompt, end-of-sequence ignored; in the order of `prompts`.

    Prompts of similar length share a left-padded batch as long as that has at most `padded_tokens` tokens.
    """
    model.generation_config = GenerationConfig()  # with the checkpoint's own it would stop at its end-of-sequence
    found: dict[int, Reference] = {}
    for part in similar_lengths(prompts, padded_tokens):
        found |= zip(part, generate_batch(model, [prompts[index] for index in part], max_tokens), strict=True)
    return [found[index] for index in range(len(prompts))]


def similar_lengths(prompts: Sequence[Sequence[int]], padded_tokens: int) -> list[list[int]]:
    """Indexes of prompts by length, cut into groups of at most `padded_tokens` once padded (but never empty ones)."""
    groups: list[list[int]] = [[]]
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        if groups[-1] and (len(groups[-1]) + 1) * len(prompts[index]) > padded_tokens:
            groups.append([])
        groups[-1].append(index)
    return groups


def generate_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Reference]:
    """One left-padded batch."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_tokens,
        pad_token_id=PAD_TOKEN,
        output_logits=True,
        return_dict_in_generate=True,
    )
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), PAD_TOKEN)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=mask, generation_config=config)
    best = torch.stack(output.logits, dim=1).topk(2, dim=-1).values  # [rows, max_tokens, 2]
    gaps = (best[..., 0] - best[..., 1]).tolist()
    return [Reference(tokens, gap) for tokens, gap in zip(output.sequences[:, width:].tolist(), gaps, strict=True)]


@dataclass(slots=True)
class Comparison:
    """How many tokens were held against a reference, how many near-ties went the other way, and what was wrong."""

    tokens: int = 0
    near_ties: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, references: Sequence[Reference], outputs: Sequence[Sequence[int]], what: str = "") -> None:
        """Compare each output with its reference, up to the first near-tie that went the other way."""
        for number, (reference, output) in enumerate(zip(references, outputs, strict=True)):
            if len(output) != len(reference.tokens):
                self.wrong.append(f"{what} prompt {number}: {len(output)} tokens of {len(reference.tokens)}")
            for at, (wanted, got) in enumerate(zip(reference.tokens, output, strict=False)):
                self.tokens += 1
                if wanted == got:
                    continue
                if reference.gaps[at] < NEAR_TIE:
                    self.near_ties += 1
                else:
                    gap = reference.gaps[at]
                    self.wrong.append(f"{what} prompt {number}, token {at}: {got} for {wanted}, ahead by {gap:.2g}")
                break

    def summary(self) -> str:
        lines = [f"{self.tokens} tokens compared, {self.near_ties} near-ties, {len(self.wrong)} wrong", *self.wrong]
        return "\n".join(lines)
