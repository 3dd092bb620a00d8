#!/usr/bin/env python3
"""What rounds of inner steps cost in loss, by how their moments begin and how their outer step is taken: DiLoCo in PyTorch, apart
from Cohort's own code, on one GPU that computes all lanes side by side.

    python bench/rounds_pytorch.py TEXT [--samples 16] [--cases short|long] [--steps N] [--json FILE]

A llama of characters (6 layers, 6 heads, 192 wide, context 128, SwiGLU, RoPE), four lanes of `--samples` samples, AdamW (0.9, 0.99),
weight decay 0.1, clipping at 1, cosine from 3e-3 after a twentieth of warm-up. A row has the validation loss after each sixth of the tokens.
The moments of a round begin

    anew     at zero, with bias correction from one: what Cohort does
    rectify  at zero, with the rectification of RAdam (Liu et al., arXiv 1908.03265)
    kept     as each lane left them: the paper's (arXiv 2311.08105), which makes a result depend on who computed a lane before
    mean     as the mean of what all lanes left, which would be exchanged, three times the bytes
    second   as `mean` for the second moment, and at zero for the first

and `ramp` is the part of a round in which the learning rate rises to its schedule. Without a GPU only `--steps` of a few is practical.
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import torch

LANES, WIDTH, LAYERS, HEADS, CONTEXT = 4, 192, 6, 6, 128
BETAS, DECAY, CLIP, PEAK = (0.9, 0.99), 0.1, 1.0, 3e-3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Model:
    """All lanes' parameters with a leading dimension of lanes, so that one product computes all."""

    def __init__(self, vocabulary):
        draw = torch.Generator(device=DEVICE).manual_seed(0)
        weight = lambda *shape, std=0.02: torch.randn(*shape, device=DEVICE, generator=draw) * std
        inner, small = (int(8 * WIDTH / 3) + 63) // 64 * 64, 0.02 / math.sqrt(2 * LAYERS)
        ones = lambda: torch.ones(WIDTH, device=DEVICE)
        self.vocabulary, self.start = vocabulary, [weight(vocabulary, WIDTH)]
        for _ in range(LAYERS):
            self.start += [ones(), weight(WIDTH, 3 * WIDTH), weight(WIDTH, WIDTH, std=small)]
            self.start += [ones(), weight(WIDTH, 2 * inner), weight(inner, WIDTH, std=small)]
        self.start += [ones(), weight(WIDTH, vocabulary)]
        half = WIDTH // HEADS // 2
        angles = torch.outer(torch.arange(CONTEXT).float(), 1e4 ** (-torch.arange(half) / half)).to(DEVICE)
        self.cos, self.sin = angles.cos(), angles.sin()

    def losses(self, parameters, x, y):
        """Mean loss of each lane; x and y are [lanes, samples, context]."""
        lanes, samples, length = x.shape
        norm = lambda h, w: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * w[:, None]

        def turn(h):
            a, b = h.chunk(2, -1)
            return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)

        parameters = iter(parameters)
        offsets = (torch.arange(lanes, device=DEVICE) * self.vocabulary)[:, None, None]
        h = next(parameters).reshape(lanes * self.vocabulary, WIDTH)[(x + offsets).reshape(lanes, -1)]
        for _ in range(LAYERS):
            first, qkv, out, second, up, down = (next(parameters) for _ in range(6))
            q, k, v = (norm(h, first) @ qkv).view(lanes * samples, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            mixed = torch.nn.functional.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
            h = h + mixed.transpose(1, 2).reshape(lanes, samples * length, WIDTH) @ out
            gate, value = (norm(h, second) @ up).chunk(2, -1)
            h = h + (torch.nn.functional.silu(gate) * value) @ down
        logits = norm(h, next(parameters)) @ next(parameters)
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        return each.view(lanes, -1).mean(1)


class Lanes:
    """One inner step of all lanes, captured once where there is a GPU. With `together` their gradients are averaged."""

    def __init__(self, model, samples, together):
        self.model, self.samples, self.together = model, samples, together
        copies = lambda p: p[None].repeat(LANES, *[1] * p.dim())
        self.parameters = [copies(p).requires_grad_() for p in model.start]
        self.first, self.second = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.x = torch.zeros(LANES, samples, CONTEXT, dtype=torch.long, device=DEVICE)
        self.y = self.x.clone()
        self.rate, self.correct1, self.correct2 = (torch.ones((), device=DEVICE) for _ in range(3))
        self.graph = None
        if DEVICE == "cuda":
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.compute()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.compute()

    def compute(self):
        losses = self.model.losses(self.parameters, self.x, self.y)
        gradients = torch.autograd.grad(losses.sum(), self.parameters)
        with torch.no_grad():
            if self.together:
                gradients = [g.mean(0, keepdim=True).expand_as(g) for g in gradients]
            norms = torch.stack([g.flatten(1).pow(2).sum(1) for g in gradients]).sum(0).sqrt()
            scale = torch.clamp(CLIP / norms, max=1.0)
            for p, g, m, v in zip(self.parameters, gradients, self.first, self.second):
                g = g * scale.view(-1, *[1] * (p.dim() - 1))
                m.lerp_(g, 1 - BETAS[0])
                v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
                if p.dim() > 2:
                    p.mul_(1 - self.rate * DECAY)
                p.sub_(self.rate * (m / self.correct1) / ((v / self.correct2).sqrt() + 1e-8))

    def step(self, x, y, rate, counts):
        self.x.copy_(x)
        self.y.copy_(y)
        for held, value in zip((self.rate, self.correct1, self.correct2), (rate, *(1 - b**n for b, n in zip(BETAS, counts)))):
            held.fill_(value)
        self.graph.replay() if self.graph else self.compute()


@torch.no_grad()
def train(lanes, text, held_out, steps, inner, moments, outer, ramp):
    """Validation losses after each sixth of `steps` inner steps."""
    model, samples = lanes.model, lanes.samples
    for p, start in zip(lanes.parameters, model.start):
        p.copy_(start.expand_as(p))
    for moment in (*lanes.first, *lanes.second):
        moment.zero_()
    windows, positions = (len(text) - 1) // CONTEXT, torch.arange(CONTEXT + 1, device=DEVICE)
    epochs = steps * LANES * samples // windows + 1
    order = torch.cat([torch.randperm(windows, generator=torch.Generator().manual_seed(1 + e)) for e in range(epochs)]).to(DEVICE)
    theta = [p.clone() for p in model.start]
    momentum, first, second = ([torch.zeros_like(p) for p in theta] for _ in range(3))
    warm, out = steps // 20, []
    for t in range(steps):
        round_, h = divmod(t, inner)
        if h == 0 and inner > 1:
            for p, at, m, v, mean1, mean2 in zip(lanes.parameters, theta, lanes.first, lanes.second, first, second):
                p.copy_(at.expand_as(p))
                if moments != "kept":
                    m.copy_(mean1.expand_as(m)) if moments == "mean" else m.zero_()
                    v.copy_(mean2.expand_as(v)) if moments in ("mean", "second") else v.zero_()
        lane = torch.arange(LANES, device=DEVICE)
        begins = (round_ * LANES * inner + lane * inner + h) * samples
        rows = order[begins[:, None] + torch.arange(samples, device=DEVICE)]
        tokens = text[rows[:, :, None] * CONTEXT + positions]
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - warm) / (steps - warm)))
        rate = PEAK * ((t + 1) / (warm + 1) if t < warm else cosine)
        if ramp and inner > 1:
            rate *= min(1.0, (h + 1) / max(1, int(inner * ramp)))
        if moments == "rectify":
            most, n = 2 / (1 - BETAS[1]) - 1, h + 1
            rho = most - 2 * n * BETAS[1] ** n / (1 - BETAS[1] ** n)
            rate *= math.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)) if rho > 4 else 0.0
        counts = (t + 1 if inner == 1 or moments in kinds else h + 1 for kinds in (("kept", "mean"), ("kept", "mean", "second")))
        with torch.enable_grad():
            lanes.step(tokens[:, :, :-1], tokens[:, :, 1:], rate, counts)
        if h == inner - 1 and inner > 1:
            for at, p, b, m, v, mean1, mean2 in zip(theta, lanes.parameters, momentum, lanes.first, lanes.second, first, second):
                delta = at - p.mean(0)
                b.mul_(outer[1]).add_(delta)
                at.sub_(outer[0] * (delta + outer[1] * b))
                mean1.copy_(m.mean(0))
                mean2.copy_(v.mean(0))
        if h == inner - 1 and (t + 1) * 6 // steps > (t + 1 - inner) * 6 // steps:
            now = [p[0].detach() for p in lanes.parameters] if inner == 1 else theta
            parts = held_out.split(64)
            sums = [model.losses([p[None] for p in now], part[None, :, :-1], part[None, :, 1:]).item() * len(part) for part in parts]
            out.append(round(sum(sums) / len(held_out), 4))
    return out


# Inner steps, how moments begin, (outer learning rate, momentum), ramp.
SHORT = [
    (50, "kept", (0.7, 0.9), 0), (50, "mean", (1.0, 0.3), 0), (50, "rectify", (1.0, 0.3), 0), (50, "anew", (1.0, 0.3), 0.1),
    (50, "anew", (1.0, 0.3), 0.2), (50, "anew", (1.0, 0.3), 0.5), (50, "anew", (1.0, 0.5), 0.2),
    (100, "mean", (1.0, 0.3), 0), (100, "anew", (1.0, 0.3), 0.2), (100, "anew", (1.0, 0.5), 0.2), (100, "anew", (0.7, 0.8), 0.2),
    (10, "mean", (1.0, 0.0), 0), (10, "mean", (1.0, 0.3), 0), (10, "anew", (1.0, 0.3), 0.2), (10, "anew", (1.0, 0.5), 0.2),
]
LONG = [(50, "kept", (0.7, 0.9), 0), (50, "anew", (0.7, 0.9), 0.2), (50, "anew", (1.0, 0.3), 0.2), (50, "anew", (1.0, 0.5), 0.2)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--samples", type=int, default=16, help="of a lane's inner step")
    parser.add_argument("--cases", choices=["short", "long"], default="short")
    parser.add_argument("--steps", type=int, help="inner steps in all; 1,200 or, in long cases, 3,600")
    parser.add_argument("--json", help="file that rows are added to")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    text = open(args.text, encoding="utf-8").read()
    numbers = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([numbers[c] for c in text], device=DEVICE)
    cut = int(0.9 * len(data))
    held = data[cut:]
    held = torch.stack([held[i * CONTEXT : i * CONTEXT + CONTEXT + 1] for i in range(min(256, (len(held) - 1) // CONTEXT))])
    model, rows = Model(len(numbers)), []
    before = json.loads(Path(args.json).read_text())["rows"] if args.json and Path(args.json).exists() else []
    steps = args.steps or (1200 if args.cases == "short" else 3600)
    every = Lanes(model, args.samples, True)
    alone = Lanes(model, args.samples, False)
    for case in [(1, "every step", None, 0), *(SHORT if args.cases == "short" else LONG)]:
        inner, moments, outer, ramp = case
        if inner > 1 and steps % inner:
            sys.exit(f"{steps} steps are no whole rounds of {inner}")
        losses = train(every if inner == 1 else alone, data[:cut], held, steps, *case)
        rows.append({"inner_steps": inner, "moments": moments, "outer": outer, "ramp": ramp, "steps": steps, "losses": losses})
        print(f"H {inner:3}  {moments:10} outer {outer}  ramp {ramp}: {losses}", flush=True)
        if args.json:
            device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
            found = {"torch": torch.__version__, "device": device, "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "rows": before + rows}
            Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
