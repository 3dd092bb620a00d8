"""Makes the golden values that `worker/src/engine/tests/finetuned.rs` compares the engine with.

    pip install torch transformers peft safetensors
    python worker/golden/make_finetuned.py [NAME ...]

Like `make.py`, for what finetuning adds: samples of which only a part is trained, several packed into one row;
classifiers; adapters. Each sample is computed by itself and unpacked, by transformers (and peft), in float64; losses and
gradients are summed over the samples. The file holds the samples packed into rows, as Cohort gets them: a target counts
where its weight is not 0, and `starts` says for each token where its sample begins.

`sft_*` train what follows a prompt. `classify_*` pool at the last token. `lora_*` and `rslora_*` do as `sft_*` with
adapters on all linear layers; the directory of the same name holds them as peft saves them.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
    LlamaForSequenceClassification,
)

HERE = Path(__file__).parent
VOCAB, CONTEXT, ROW, FILL = 61, 16, 14, 0
LABELS = ["ham", "spam", "other"]
# The lengths of the samples of each row, and how many tokens of each are its prompt.
ROWS = [[(6, 3), (5, 1)], [(9, 4)]]
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
BASE = dict(vocab_size=VOCAB, context=CONTEXT, num_hidden_layers=2, dropout=0.0, norm_eps=1e-5, rope_theta=10000.0,
            initializer_range=0.02)
SHAPES = {
    "llama": dict(architecture="llama", hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
                  intermediate_size=44, bias=False, tie_word_embeddings=False),
    "gpt2": dict(architecture="gpt2", hidden_size=24, num_attention_heads=3, num_key_value_heads=3,
                 intermediate_size=96, bias=True, tie_word_embeddings=True),
}


def make(family, labels=0):
    more = dict(num_labels=labels) if labels else {}
    if family == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, attn_implementation="eager",
            pad_token_id=None, **more,
        )
        return (LlamaForSequenceClassification if labels else LlamaForCausalLM)(config)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=24, n_layer=2, n_head=3, layer_norm_epsilon=1e-5,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager", pad_token_id=None, **more,
    )
    return (GPT2ForSequenceClassification if labels else GPT2LMHeadModel)(config)


def randomise(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(0, 0.2)
            elif name.endswith(".bias"):
                p.normal_(0, 0.1)
            else:
                p.normal_(1, 0.1)
            p.copy_(p.float())  # weights are exact in float32


def samples():
    """For each row, its samples: tokens, and how many of them are the prompt."""
    return [[(torch.randint(0, VOCAB, (length,)), prompt) for length, prompt in row] for row in ROWS]


def nll(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def packed(rows, targets_of):
    """Rows of tokens, targets, weights and starts; `targets_of` gives the targets of a sample by place."""
    out = {name: torch.zeros(len(rows), ROW, dtype=torch.int32) for name in ("inputs", "targets", "starts")}
    out["inputs"].fill_(FILL)
    out["weights"] = torch.zeros(len(rows), ROW)
    for r, row in enumerate(rows):
        begin = 0
        for sample in row:
            tokens = sample[0]
            out["inputs"][r, begin:begin + len(tokens)] = tokens.int()
            out["starts"][r, begin:] = begin
            for place, target in targets_of(sample).items():
                out["targets"][r, begin + place] = target
                out["weights"][r, begin + place] = 1.0
            begin += len(tokens)
    return out


def trained(sample):
    tokens, prompt = sample
    return {place - 1: int(tokens[place]) for place in range(prompt, len(tokens))}


def sft_loss(model, rows):
    loss = 0.0
    for sample in (sample for row in rows for sample in row):
        logits = model(sample[0][None]).logits[0]
        targets = trained(sample)
        loss = loss + nll(logits[list(targets)], torch.tensor(list(targets.values())))
    return loss


def gradients(model, name_of=lambda name: name):
    out = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            out[f"norm.{name_of(name)}"] = p.grad.norm().float().view(1)
            out[f"first.{name_of(name)}"] = p.grad.flatten()[:8].float().contiguous()
    return out


def weights(model):
    return {f"w.{name}": p.detach().float().contiguous() for name, p in model.named_parameters()}


def save(name, family, out, labels=()):
    metadata = {"model": json.dumps({**BASE, **SHAPES[family], **({"labels": list(labels)} if labels else {})})}
    save_file(out, HERE / f"{name}.safetensors", metadata=metadata)


def wanted(name):
    chosen = not sys.argv[1:] or name in sys.argv[1:]
    torch.manual_seed(sum(name.encode()))
    return chosen


def sft(family):
    name = f"sft_{family}"
    if not wanted(name):
        return
    model = make(family).double().eval()
    randomise(model)
    rows = samples()
    loss = sft_loss(model, rows)
    loss.backward()
    logits = model(rows[0][1][0][None]).logits[0].detach().float().contiguous()
    save(name, family, {**packed(rows, trained), **weights(model), **gradients(model),
                        "loss": loss.detach().float().view(1), "logits": logits})


def classify(family):
    name = f"classify_{family}"
    if not wanted(name):
        return
    model = make(family, len(LABELS)).double().eval()
    randomise(model)
    rows = [[(tokens, int(torch.randint(0, len(LABELS), ()))) for tokens, _ in row] for row in samples()]
    loss = 0.0
    for tokens, label in (sample for row in rows for sample in row):
        loss = loss + nll(model(tokens[None]).logits, torch.tensor([label]))
    loss.backward()
    logits = model(rows[0][1][0][None]).logits[0].detach().float().contiguous()
    batch = packed(rows, lambda sample: {len(sample[0]) - 1: sample[1]})
    save(name, family, {**batch, **weights(model), **gradients(model), "loss": loss.detach().float().view(1),
                        "logits": logits}, LABELS)


def lora(family, rslora):
    name = f"{'rslora' if rslora else 'lora'}_{family}"
    if not wanted(name):
        return
    model = make(family)
    randomise(model)
    out = weights(model)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS[family],
                        use_rslora=rslora, fan_in_fan_out=family == "gpt2")
    adapted = get_peft_model(model, config).double().eval()
    with torch.no_grad():
        for key, p in adapted.named_parameters():
            if ".lora_" in key:
                p.normal_(0, 0.2)
                p.copy_(p.float())
    rows = samples()
    loss = sft_loss(adapted, rows)
    loss.backward()
    logits = adapted(rows[0][1][0][None]).logits[0].detach().float().contiguous()
    # In the file peft leaves the name of the adapter out.
    grads = gradients(adapted, lambda key: key.replace(".default.", "."))
    save(name, family, {**packed(rows, trained), **out, **grads, "loss": loss.detach().float().view(1),
                        "logits": logits})
    adapted.float().save_pretrained(HERE / name)
    (HERE / name / "README.md").unlink(missing_ok=True)


for family in ("llama", "gpt2"):
    sft(family)
    classify(family)
    lora(family, False)
    lora(family, True)
