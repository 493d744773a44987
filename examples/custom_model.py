"""A model of one's own in the engine: defined, trained for some seconds, served over HTTP, its answers checked.

MinimalLLM learns to sort digits: "52413>" is answered "12345". All that the engine asks of a model is its attributes
and the call of `paged_attention`: causal attention while training, over the KV cache when serving.
"""

import asyncio
import json
import random
import tempfile
import urllib.request
from pathlib import Path

import torch
from fast_inference import AsyncEngine, paged_attention, register_model
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

ALPHABET = ["<eos>", ">", *"0123456789"]
DIGITS, PORT = 5, 8123
SHAPE = {"num_layers": 2, "width": 64, "num_heads": 4}


class Block(nn.Module):
    def __init__(self, layer: int, width: int, heads: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, heads
        self.norm1, self.qkv, self.out = nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).chunk(3, dim=-2)
        x = x + self.out(paged_attention(q, k, v, self.layer).flatten(-2))
        return x + self.mlp(x)


class MinimalLLM(nn.Module):
    def __init__(self, num_layers: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_heads, width // num_heads
        self.vocab_size, self.max_model_len = len(ALPHABET), 32
        self.tokens, self.places = nn.Embedding(self.vocab_size, width), nn.Embedding(self.max_model_len, width)
        self.blocks = nn.Sequential(*(Block(layer, width, num_heads) for layer in range(num_layers)))
        self.head = nn.Linear(width, self.vocab_size)

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:  # [T] each, or [B, T] and [T] in training
        return self.head(self.blocks(self.tokens(token_ids) + self.places(positions)))


def train(model: MinimalLLM, steps: int = 250) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(steps):
        digits = torch.randint(2, 12, (64, DIGITS))
        ids = torch.cat([digits, torch.ones(64, 1, dtype=torch.long), digits.sort().values], dim=1)
        logits = model(ids[:, :-1], torch.arange(2 * DIGITS))[:, DIGITS:]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, DIGITS + 1 :].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"trained {steps} steps, loss {loss.item():.4f}")


def make_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(ALPHABET)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def complete(prompt: str) -> str:
    body = json.dumps({"model": "sorter", "prompt": prompt, "max_tokens": DIGITS, "temperature": 0}).encode()
    url, headers = f"http://127.0.0.1:{PORT}/v1/completions", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as answer:
        return json.load(answer)["choices"][0]["text"]


async def main() -> None:
    torch.manual_seed(0)
    model, folder = MinimalLLM(**SHAPE), Path(tempfile.mkdtemp())
    train(model)
    save_file(model.state_dict(), folder / "weights.safetensors")
    make_tokenizer(folder)
    register_model("MinimalLLM", MinimalLLM)
    options = {"model_config": {**SHAPE, "weights": str(folder / "weights.safetensors")}, "tokenizer": str(folder)}
    async with AsyncEngine(model="class:MinimalLLM", served_model_name="sorter", port=PORT, **options):
        prompts = ["".join(random.choices("0123456789", k=DIGITS)) + ">" for _ in range(20)]
        answers = await asyncio.gather(*(asyncio.to_thread(complete, prompt) for prompt in prompts))
    right = sum(answer == "".join(sorted(prompt[:-1])) for prompt, answer in zip(prompts, answers, strict=True))
    print(f"{prompts[0]} {answers[0]} ... {right} of {len(prompts)} right")
    assert right >= 18, list(zip(prompts, answers, strict=True))


if __name__ == "__main__":
    asyncio.run(main())
