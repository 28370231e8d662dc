"""The models of `benchmarks.accelerator` in torch, trained under `torch.autocast` and `torch.compile`.

A its own process, so that neither framework holds memory while the other trains: prints figures as JSON. Attention,
loss, optimizer and data are those of the models in Flax; parameters are torch's own draw.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import _training_sizes


class Attention(nn.Module):
    """Causal self-attention with one matmul for queries, keys and values, and a softmax in float32."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, length, width = x.shape
        query, key, value = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / math.sqrt(width // self.heads)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).to(value.dtype)
        return self.out((weights @ value).transpose(1, 2).reshape(n, length, width))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, sizes: _training_sizes.Text):
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        nn.init.normal_(self.embed.weight, std=sizes.width**-0.5)
        self.positions = nn.Parameter(0.02 * torch.randn(sizes.length, sizes.width))
        self.layers = nn.ModuleList(Layer(sizes.width, sizes.heads) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)

    def forward(self, text):
        x = self.embed(text) + self.positions
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embed.weight)


def conv_and_norm(before: int, after: int, size: int, stride: int = 1) -> nn.Module:
    """Without a bias, and without running averages."""
    conv = nn.Conv2d(before, after, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after, eps=1e-5, track_running_stats=False))


class Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.one = conv_and_norm(before, width, 1)
        self.two = conv_and_norm(width, width, 3, stride)
        self.three = conv_and_norm(width, 4 * width, 1)
        same = before == 4 * width and stride == 1
        self.project = nn.Identity() if same else conv_and_norm(before, 4 * width, 1, stride)

    def forward(self, x):
        y = self.three(F.relu(self.two(F.relu(self.one(x)))))
        return F.relu(self.project(x) + y)


class ResNet(nn.Module):
    def __init__(self, sizes: _training_sizes.Images):
        super().__init__()
        channels = sizes.stages[0][0]
        self.stem, blocks = conv_and_norm(3, channels, 7, 2), []
        for stage, (width, count) in enumerate(sizes.stages):
            for index in range(count):
                blocks.append(Bottleneck(channels, width, 2 if stage and not index else 1))
                channels = 4 * width
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(channels, sizes.classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


def model_of(sizes: _training_sizes.Sizes, device: str) -> nn.Module:
    torch.manual_seed(0)
    if isinstance(sizes, _training_sizes.Text):
        return GPT(sizes).to(device)
    return ResNet(sizes).to(device, memory_format=torch.channels_last)


def batch_of(sizes: _training_sizes.Sizes, step: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = (torch.tensor(array, device=device) for array in sizes.draw(step))
    if isinstance(sizes, _training_sizes.Images):
        inputs = inputs.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return inputs, labels.long()


def train(sizes: _training_sizes.Sizes, device: str, *, steps: int, rounds: int, last: int) -> dict[str, Any]:
    """Figures of one training, under the names that they have in a `Run`."""
    torch.set_float32_matmul_precision("high")
    model = torch.compile(model_of(sizes, device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=1e-4, fused=True)

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = model(batch[0])
            loss = F.cross_entropy(logits.flatten(0, -2).float(), batch[1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    batches = [batch_of(sizes, index, device) for index in range(min(sizes.distinct, steps * rounds))]
    losses, rates = [], []
    for number in range(rounds):
        for index in range(steps):
            if index == 1:
                losses[-1].item()
                begun = time.perf_counter()
            start = time.perf_counter()
            losses.append(step(batches[(number * steps + index) % len(batches)]))
            if len(losses) == 1:
                losses[0].item()
                compilation = time.perf_counter() - start
        losses[-1].item()
        rates.append(sizes.units * (steps - 1) / (time.perf_counter() - begun))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    loss = statistics.mean(float(loss) for loss in losses[-last:])
    return {"rates": rates, "loss": loss, "compile_seconds": compilation, "peak_bytes": peak}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains on the GPU that torch finds, and prints figures by name of the model; says so where there is none."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--texts", type=int, help="in a batch (default: tiny models)")
    made.add_argument("--steps", type=int, required=True)
    made.add_argument("--rounds", type=int, required=True)
    made.add_argument("--last", type=int, required=True, help="steps over which the loss is averaged")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = made.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no CUDA device")
    found = {}
    for name, sizes in (_training_sizes.full(options.texts) if options.texts else _training_sizes.TINY).items():
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            found[name] = train(sizes, options.device, steps=options.steps, rounds=options.rounds, last=options.last)
        except torch.OutOfMemoryError as error:
            found[name] = {"error": f"torch.OutOfMemoryError: {error}".splitlines()[0]}
        torch.cuda.empty_cache()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
