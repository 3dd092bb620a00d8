"""Makes the golden values that `worker/src/engine/tests/golden.rs` compares the engine with.

    pip install torch transformers safetensors
    python worker/golden/make.py

Each file `NAME.safetensors` holds a small random model's weights (names and shapes of Hugging Face, prefix `w.`), a
batch, and what PyTorch computes from it in float64 and rounds to float32: logits of the first sample, the weighted
sum of losses, and the norm and first elements of each parameter's gradient. `adamw.safetensors` holds five steps of
torch.optim.AdamW.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
VOCAB, CONTEXT, SAMPLES, LENGTH = 61, 16, 2, 11


def llama(tied, theta):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_theta=theta, attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def gpt2():
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=24, n_layer=2, n_head=3, layer_norm_epsilon=1e-5,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )
    return GPT2LMHeadModel(config)


def randomise(model, bias):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(0, 0.2)
            elif name.endswith(".bias"):
                p.normal_(0, 0.1) if bias else p.zero_()
            else:
                p.normal_(1, 0.1)
            p.copy_(p.float())  # weights are exact in float32


def golden(name, model, config, bias=True):
    torch.manual_seed(len(name))
    model = model.double().eval()
    randomise(model, bias)
    inputs = torch.randint(0, VOCAB, (SAMPLES, LENGTH))
    targets = torch.randint(0, VOCAB, (SAMPLES, LENGTH))
    weights = torch.randint(0, 3, (SAMPLES, LENGTH)).double() / 2
    logits = model(inputs).logits
    nll = torch.nn.functional.cross_entropy(logits.view(-1, VOCAB), targets.view(-1), reduction="none")
    loss = (nll * weights.view(-1)).sum()
    loss.backward()
    out = {
        "inputs": inputs.int(), "targets": targets.int(), "weights": weights.float(),
        "logits": logits[0].detach().float().contiguous(), "loss": loss.detach().float().view(1),
    }
    for key, p in model.named_parameters():
        if not bias and key.endswith(".bias"):
            continue
        out[f"w.{key}"] = p.detach().float().contiguous()
        out[f"norm.{key}"] = p.grad.norm().float().view(1)
        out[f"first.{key}"] = p.grad.flatten()[:8].float().contiguous()
    base = dict(vocab_size=VOCAB, context=CONTEXT, num_hidden_layers=2, dropout=0.0, norm_eps=1e-5,
                rope_theta=10000.0, initializer_range=0.02)
    save_file(out, HERE / f"{name}.safetensors", metadata={"model": json.dumps({**base, **config})})


def adamw():
    torch.manual_seed(1)
    matrix, vector = torch.randn(6, 5), torch.randn(7)
    out = {"matrix": matrix.clone(), "vector": vector.clone()}
    params = [matrix.requires_grad_(), vector.requires_grad_()]
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    for step in range(1, 6):
        grads = [torch.randn_like(p) * 4.0 for p in params]
        for name, p, g in zip(("matrix", "vector"), params, grads):
            out[f"grad.{name}.{step}"] = g
            p.grad = g * 0.25
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / math.sqrt(step)
        optimizer.step()
    for name, p in zip(("matrix", "vector"), params):
        state = optimizer.state[p]
        out[f"after.{name}"] = p.detach().clone()
        out[f"exp_avg.{name}"] = state["exp_avg"]
        out[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
    save_file(out, HERE / "adamw.safetensors")


LLAMA = dict(architecture="llama", hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=44, bias=False)
GPT2 = dict(architecture="gpt2", hidden_size=24, num_attention_heads=3, num_key_value_heads=3,
            intermediate_size=96, tie_word_embeddings=True)
golden("llama_tied", llama(True, 10000.0), {**LLAMA, "tie_word_embeddings": True})
golden("llama_untied", llama(False, 500.0), {**LLAMA, "tie_word_embeddings": False, "rope_theta": 500.0})
golden("gpt2_bias", gpt2(), {**GPT2, "bias": True})
golden("gpt2_plain", gpt2(), {**GPT2, "bias": False}, bias=False)
adamw()
