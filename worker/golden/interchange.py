"""Checks that models go from transformers to Cohort and back with the same logits, and adapters from peft.

    pip install torch transformers peft safetensors
    python worker/golden/interchange.py [DIRECTORY]

Saves small random models of every family with transformers, in all the forms that are read (f32, f16, bf16, sharded),
with the logits of a few tokens beside them; lets `cargo test` of the worker read them, compare, and export models of
its own; then loads those with transformers and compares. The same is done with adapters, through peft, and with
classifiers, at the last token. Prints the largest difference of each and fails from 1e-4 on.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig,
    MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)

TOLERANCE = 1e-4
VOCAB, CONTEXT = 97, 64
ROPE = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None,
)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)


def models():
    """Name, model, element type, and the size of a shard."""
    yield "llama", LlamaForCausalLM(LlamaConfig(**ROPE)), torch.float32, "1GB"
    yield "llama_tied_f16", LlamaForCausalLM(LlamaConfig(**ROPE, tie_word_embeddings=True)), torch.float16, "1GB"
    llama3 = LlamaConfig(**ROPE, rope_theta=5e5, rope_scaling=dict(LLAMA3), head_dim=16)
    yield "llama3_rope", LlamaForCausalLM(llama3), torch.float32, "1GB"
    linear = LlamaConfig(**ROPE, rope_scaling=dict(rope_type="linear", factor=2.0))
    yield "llama_linear_rope", LlamaForCausalLM(linear), torch.float32, "1GB"
    yield "mistral", MistralForCausalLM(MistralConfig(**ROPE, sliding_window=None)), torch.float32, "1GB"
    yield "mistral_bf16_sharded", MistralForCausalLM(MistralConfig(**ROPE, sliding_window=None)), torch.bfloat16, "40KB"
    yield "qwen2", Qwen2ForCausalLM(Qwen2Config(**ROPE)), torch.float32, "1GB"
    yield "qwen2_tied_sharded", Qwen2ForCausalLM(Qwen2Config(**ROPE, tie_word_embeddings=True)), torch.float32, "60KB"
    yield "qwen3", Qwen3ForCausalLM(Qwen3Config(**ROPE, head_dim=12)), torch.float32, "1GB"
    yield "qwen3_tied_bf16", Qwen3ForCausalLM(Qwen3Config(**ROPE, head_dim=8, tie_word_embeddings=True)), torch.bfloat16, "1GB"
    gpt2 = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=48, n_layer=3, n_head=4, bos_token_id=None,
                      eos_token_id=None)
    yield "gpt2", GPT2LMHeadModel(gpt2), torch.float32, "1GB"


def randomise(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean = 0.0 if p.ndim == 2 or name.endswith(".bias") else 1.0
            p.normal_(mean, 0.15)


def loaded(directory, auto=AutoModelForCausalLM, **more):
    return auto.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager", **more).eval()


def computed(model, tokens):
    with torch.no_grad():
        return model(tokens[None].long()).logits[0]


def logits_of(directory, tokens):
    return computed(loaded(directory), tokens)


def save(directory):
    torch.manual_seed(0)
    for name, model, dtype, shard in models():
        randomise(model)
        target = directory / name
        model.to(dtype).save_pretrained(target, max_shard_size=shard)
        if "sharded" in name:
            assert (target / "model.safetensors.index.json").exists(), f"{name} is not sharded"
        tokens = torch.randint(0, VOCAB, (CONTEXT - 3,), dtype=torch.int32)
        # From the weights as they were saved: what rounding to 16 bits lost is lost for both.
        save_file({"tokens": tokens, "logits": logits_of(target, tokens).contiguous()}, target / "logits.safetensors")


def save_adapters(directory):
    torch.manual_seed(1)
    targets = {"gpt2": ["c_attn", "c_proj", "c_fc"], "rope": "all-linear"}
    for name, model, dtype, _ in models():
        if dtype != torch.float32 or "sharded" in name:
            continue
        randomise(model)
        model.save_pretrained(directory / name / "base")
        kind = "gpt2" if name == "gpt2" else "rope"
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets[kind],
                            use_rslora="qwen" in name, fan_in_fan_out=kind == "gpt2")
        adapted = get_peft_model(loaded(directory / name / "base"), config).eval()
        with torch.no_grad():
            for key, p in adapted.named_parameters():
                if ".lora_" in key:
                    p.normal_(0, 0.15)
        adapted.save_pretrained(directory / name / "adapter")
        tokens = torch.randint(0, VOCAB, (CONTEXT - 3,), dtype=torch.int32)
        logits = computed(adapted, tokens).contiguous()
        save_file({"tokens": tokens, "logits": logits}, directory / name / "logits.safetensors")


def with_adapter(target, tokens):
    labels = 3 if target.name.endswith("-3") else 0
    more = dict(num_labels=labels) if labels else {}
    base = loaded(target / "base", AutoModelForSequenceClassification if labels else AutoModelForCausalLM, **more)
    return computed(PeftModel.from_pretrained(base, target / "adapter").eval(), tokens)


def classifier(target, tokens):
    return computed(loaded(target, AutoModelForSequenceClassification), tokens)


def compare(directory, compute=logits_of):
    worst = 0.0
    for target in sorted(directory.iterdir()):
        expected = load_file(target / "logits.safetensors")
        logits = compute(target, expected["tokens"])
        # A classifier is asked after the last token alone.
        ours = expected["logits"] if logits.ndim == 2 else expected["logits"][-1]
        apart = (logits - ours).abs().max().item()
        print(f"{directory.name} {target.name}: largest difference {apart:.1e}, largest logit {ours.abs().max():.1f}")
        worst = max(worst, apart)
    if worst >= TOLERANCE:
        sys.exit(f"error: logits are {worst:.1e} apart; less than {TOLERANCE} was expected")


def main(directory):
    save(directory / "saved")
    save_adapters(directory / "saved-adapters")
    command = ["cargo", "test", "-p", "cohort-common", "-p", "cohort-worker", "--lib", "interchange", "--", "--nocapture"]
    environment = {**os.environ, "COHORT_INTERCHANGE": str(directory.resolve())}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parent)
    compare(directory / "exported")
    compare(directory / "exported-adapters", with_adapter)
    compare(directory / "exported-classifiers", classifier)


if sys.argv[1:]:
    main(Path(sys.argv[1]))
else:
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
