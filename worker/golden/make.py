"""Makes the golden values that `worker/src/engine/tests/golden.rs` compares the engine with.

    pip install torch transformers safetensors
    python worker/golden/make.py [NAME ...]

Without names all are made; the bits of other versions of torch may differ in the last place.

Each file `NAME.safetensors` holds a small random model's weights (names and shapes of Hugging Face, prefix `w.`), a
batch, and what PyTorch computes from it in float64 and rounds to float32: logits of the first sample, the weighted
sum of losses, and the norm and first elements of each parameter's gradient. The header holds the model as Cohort
describes it, and for most also `config.json` as transformers writes it. `adamw.safetensors` holds five steps of
torch.optim.AdamW.
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config,
    Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)

HERE = Path(__file__).parent
VOCAB, CONTEXT, SAMPLES, LENGTH = 61, 16, 2, 11


def llama(tied, theta):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_theta=theta, attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def family(config_class, model_class, tied, **fields):
    """A model that has what only some have; its config goes into the header as transformers writes it."""
    config = config_class(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        attn_implementation="eager", architectures=[model_class.__name__], **fields,
    )
    return model_class(config)


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


def golden(name, make, config, bias=True, header=False):
    if sys.argv[1:] and name not in sys.argv[1:]:
        return
    model = make()
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
    metadata = {"model": json.dumps({**base, **config})}
    if header:
        metadata["config"] = model.config.to_json_string()
    save_file(out, HERE / f"{name}.safetensors", metadata=metadata)


def adamw():
    if sys.argv[1:] and "adamw" not in sys.argv[1:]:
        return
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
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
golden("llama_tied", lambda: llama(True, 10000.0), {**LLAMA, "tie_word_embeddings": True})
golden("llama_untied", lambda: llama(False, 500.0), {**LLAMA, "tie_word_embeddings": False, "rope_theta": 500.0})
golden("gpt2_bias", gpt2, {**GPT2, "bias": True})
golden("gpt2_plain", gpt2, {**GPT2, "bias": False}, bias=False)
golden("llama3_rope", lambda: family(LlamaConfig, LlamaForCausalLM, True, rope_theta=500.0, rope_scaling=dict(LLAMA3)),
       {**LLAMA, "tie_word_embeddings": True, "rope_theta": 500.0, "rope_scaling": LLAMA3}, header=True)
golden("llama_linear_rope", lambda: family(LlamaConfig, LlamaForCausalLM, False, head_dim=6,
                                           rope_scaling=dict(rope_type="linear", factor=2.0)),
       {**LLAMA, "tie_word_embeddings": False, "head_dim": 6, "rope_scaling": dict(rope_type="linear", factor=2.0)},
       header=True)
golden("mistral", lambda: family(MistralConfig, MistralForCausalLM, False, sliding_window=None),
       {**LLAMA, "tie_word_embeddings": False}, header=True)
for tied in (True, False):
    golden("qwen2_tied" if tied else "qwen2_untied", lambda: family(Qwen2Config, Qwen2ForCausalLM, tied),
           {**LLAMA, "tie_word_embeddings": tied, "attention_bias": True}, header=True)
    golden("qwen3_tied" if tied else "qwen3_untied",
           lambda: family(Qwen3Config, Qwen3ForCausalLM, tied, head_dim=12 if tied else 8),
           {**LLAMA, "tie_word_embeddings": tied, "qk_norm": True, **({"head_dim": 12} if tied else {})}, header=True)
adamw()
