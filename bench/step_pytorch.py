"""The PyTorch side of `cargo bench -p cohort-worker --bench step`: the same models, batches and steps.

    pip install torch
    python bench/step_pytorch.py [a] [b-llama] [b-gpt2] [c] [gpt2] [links] [--device D] [--threads N] [--seconds S] [--bf16] [--gradient-checkpointing]
                                  [--json] [--ddp]

Plain modules in float32 without TF32 (with --bf16 under autocast), scaled_dot_product_attention, fused AdamW; the median over steps.
With --ddp it is one process of DistributedDataParallel over gloo; the launcher sets RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT, and every process prints its own speed.
"""

import argparse
import json
import os
import resource
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SHAPES = {  # layers, heads, hidden, context, samples, vocabulary
    "a": (4, 4, 128, 64, 12, 65),
    "b-llama": (6, 6, 384, 256, 4, 4096),
    "b-gpt2": (6, 6, 384, 256, 4, 4096),
    "c": (12, 12, 768, 256, 1, 50257),
    "gpt2": (12, 12, 768, 1024, 8, 50257),
    "links": (6, 6, 384, 128, 2, 4096),
}


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    def __init__(self, llama, heads, hidden, bias):
        super().__init__()
        self.llama, self.heads = llama, heads
        norm = nn.RMSNorm if llama else lambda h, eps: nn.LayerNorm(h, eps=eps, bias=bias)
        self.norm1, self.norm2 = norm(hidden, eps=1e-5), norm(hidden, eps=1e-5)
        inner = 1024 if llama else 4 * hidden
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=bias)
        self.out = nn.Linear(hidden, hidden, bias=bias)
        self.up = nn.Linear(hidden, 2 * inner if llama else inner, bias=bias)
        self.down = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x, cos, sin):
        b, t, h = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        if self.llama:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, h))
        u = self.up(self.norm2(x))
        if self.llama:
            gate, up = u.chunk(2, -1)
            return x + self.down(F.silu(gate) * up)
        return x + self.down(F.gelu(u, approximate="tanh"))


class Model(nn.Module):
    def __init__(self, name, checkpointing):
        super().__init__()
        self.checkpointing = checkpointing
        layers, heads, hidden, context, _, vocab = SHAPES[name]
        self.llama, bias = name in ("b-llama", "links"), name in ("c", "gpt2")
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = None if self.llama else nn.Embedding(context, hidden)
        self.blocks = nn.ModuleList(Block(self.llama, heads, hidden, bias) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5) if self.llama else nn.LayerNorm(hidden, bias=bias)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, 0, 0.02)
        half = hidden // heads // 2
        angle = torch.outer(torch.arange(context), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, inputs, targets):
        x = self.tokens(inputs)
        if self.positions is not None:
            x = x + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, self.cos, self.sin, use_reentrant=False) if self.checkpointing else block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def measure(name, args):
    _, _, _, context, samples, vocab = SHAPES[name]
    torch.manual_seed(1)
    model = Model(name, args.gradient_checkpointing).to(args.device)
    if args.ddp:
        model = nn.parallel.DistributedDataParallel(model)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    inputs, targets = (torch.randint(0, vocab, (samples, context), device=args.device) for _ in range(2))
    times, start = [], time.perf_counter()
    # Processes of one group take equally many steps.
    fixed = args.steps if args.ddp else 0
    while len(times) < (fixed or 5) or (not fixed and time.perf_counter() - start < args.seconds):
        begin = time.perf_counter()
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16):
            loss = model(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter() - begin)
    step = statistics.median(times)
    speed, peak = samples * context / step, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    if args.json:
        print(json.dumps({"model": name, "tokens_per_s": speed, "step_ms": step * 1e3, "peak_mb": peak}), flush=True)
    else:
        print(f"{name:8} {speed:9.0f} tokens/s  {step * 1e3:8.2f} ms per step; peak {peak:.0f} MB", flush=True)


parser = argparse.ArgumentParser()
parser.add_argument("models", nargs="*", choices=[*SHAPES, []])
parser.add_argument("--device", default="cpu")
parser.add_argument("--threads", type=int, default=None)
parser.add_argument("--seconds", type=float, default=5.0)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--gradient-checkpointing", action="store_true")
parser.add_argument("--json", action="store_true")
parser.add_argument("--ddp", action="store_true")
parser.add_argument("--steps", type=int, default=20, help="of each process with --ddp")
args = parser.parse_args()
if args.threads:
    torch.set_num_threads(args.threads)
if args.ddp:
    torch.distributed.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
if not args.json:
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
for name in args.models or ["a", "b-llama", "b-gpt2"]:
    measure(name, args)
