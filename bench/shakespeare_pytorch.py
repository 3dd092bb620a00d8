"""nanoGPT's CPU recipe for Tiny Shakespeare in plain PyTorch: the other side of `bench/run.py text`.

    python bench/shakespeare_pytorch.py TEXT [--threads N] [--steps N]

4 layers, 4 heads, 128 wide, context 64, batch 12, 2,000 steps, AdamW 0.9/0.99, decay 0.1, clip 1.0, warm-up 100 to 1e-3,
cosine to 1e-4, no bias, no dropout. Trains on the first nine tenths of the characters and scores the last tenth whole, in
windows that do not overlap. Prints one line of JSON: seconds of training, of everything, and the loss in nats.
"""

import argparse
import json
import math
import time

start = time.perf_counter()
import torch
import torch.nn.functional as F
from torch import nn

LAYERS, HEADS, HIDDEN, CONTEXT, BATCH = 4, 4, 128, 64, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN, bias=False), nn.LayerNorm(HIDDEN, bias=False)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False), nn.Linear(4 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x):
        b, t, h = x.shape
        q, k, v = (y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, h))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Model(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(HIDDEN, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                projects = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * LAYERS) if projects else 0.02)

    def forward(self, inputs, targets):
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(self.norm(x), self.tokens.weight).flatten(0, 1), targets.flatten())


parser = argparse.ArgumentParser()
parser.add_argument("text")
parser.add_argument("--threads", type=int)
parser.add_argument("--steps", type=int, default=2000)
args = parser.parse_args()
if args.threads:
    torch.set_num_threads(args.threads)
torch.manual_seed(1337)
text = open(args.text, encoding="utf-8").read()
places = {c: i for i, c in enumerate(sorted(set(text)))}
data = torch.tensor([places[c] for c in text])
train, validation = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
model = Model(len(places))
groups = [
    {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
    {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
begin = time.perf_counter()
for step in range(args.steps):
    warm, done = (step + 1) / 101, (step - 100) / max(1, args.steps - 100)
    rate = 1e-3 * warm if step < 100 else 1e-4 + 0.45e-3 * (1 + math.cos(math.pi * done))
    for group in groups:
        group["lr"] = rate
    at = torch.randint(len(train) - CONTEXT, (BATCH,))
    inputs = torch.stack([train[i : i + CONTEXT] for i in at])
    targets = torch.stack([train[i + 1 : i + 1 + CONTEXT] for i in at])
    loss = model(inputs, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
trained = time.perf_counter() - begin
with torch.no_grad():
    count = (len(validation) - 1) // CONTEXT
    inputs = validation[: count * CONTEXT].view(count, CONTEXT)
    targets = validation[1 : count * CONTEXT + 1].view(count, CONTEXT)
    losses = [model(i, t).item() * len(i) for i, t in zip(inputs.split(64), targets.split(64))]
found = {"training_s": trained, "all_s": time.perf_counter() - start, "loss": sum(losses) / count}
print(json.dumps({**found, "torch": torch.__version__, "threads": torch.get_num_threads()}))
