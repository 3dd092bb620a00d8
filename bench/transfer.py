#!/usr/bin/env python3
"""Measures what a pretrained start is worth, and writes docs/transfer.md with its pictures.

    cargo build --release
    python3 bench/transfer.py --books DIR --tales DIR --spam FILE

Trains a small model on --books, then finetunes it on --tales (text) and on --spam (lines with `text` and `label`), each
against the same from scratch and on less data, and the tales once more with replay and once as adapters. All that is
written down comes from the `transfer.json` of these runs. Finished runs in --home are found again, so that the command
goes on where it was stopped. Nothing here is a matter of speed: the figures are the same on any machine whose numerics
have the same fingerprint.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SPEC = """
[model]
hidden_size = 192
num_hidden_layers = 4
num_attention_heads = 6
context = 128
[tokenizer]
vocab_size = 2048
[train]
steps = 1200
lanes = 4
micro_batch = 8
learning_rate = 2e-3
eval_every = 200
eval_samples = 256
"""

TALES = ["train.steps=200", "train.learning_rate=5e-4", "train.eval_every=20", "train.eval_samples=256"]
SPAM = ["train.steps=60", "train.learning_rate=5e-4", "train.eval_every=10", "corpus.too_long=truncate"]


class Lab:
    def __init__(self, args):
        self.cohort, self.home, self.workers = args.cohort, args.home, args.workers

    def run(self, *words):
        command = [self.cohort, *map(str, words), "--home", self.home]
        print("$", " ".join(map(str, command)), flush=True)
        subprocess.run(list(map(str, command)), check=True)

    def finished(self, name):
        """Whether a run of that name has finished."""
        command = [self.cohort, "status", name, "--json", "--home", self.home]
        found = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        return found.returncode == 0 and '"status":"finished"' in found.stdout

    def pretrain(self, books):
        if self.finished("books"):
            return
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as spec:
            spec.write(SPEC)
            spec.flush()
            self.run("pretrain", spec.name, "--corpus", books, "--name", "books", "--local", self.workers)

    def finetune(self, name, settings, *words):
        report = Path(self.home) / "reports" / name / "transfer.json"
        if not report.exists():
            sets = [word for setting in settings for word in ("--set", setting)]
            self.run("finetune", "--from", "books@best", "--name", name, "--local", self.workers, *words, *sets)
        return json.loads(report.read_text())


def nats(loss):
    return f"{loss:.4f}"


def ratio(a, b):
    """Perplexity of a loss as a part of another's."""
    import math

    return f"{100 * math.exp(a - b):.0f} %"


def pairs(report):
    for own in report["runs"]:
        if own["start"] == "pretrained":
            for other in report["runs"]:
                if other["start"] == "scratch" and other["data_share"] == own["data_share"]:
                    yield own, other


def reached(run, loss):
    return next((step for step, found in run["losses"] if found <= loss), None)


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def share(value):
    return f"{100 * value:g} %"


def tales_table(report):
    rows = []
    for own, scratch in pairs(report):
        step = reached(own, scratch["best_loss"])
        rows.append([
            share(own["data_share"]), nats(own["losses"][0][1]), nats(own["best_loss"]), nats(scratch["best_loss"]),
            ratio(own["best_loss"], scratch["best_loss"]),
            "never" if step is None else f"{step} against {scratch['best_step']}",
        ])
    return table(["training data", "pretrained, before", "pretrained, best", "from scratch, best",
                  "perplexity of scratch's", "steps to scratch's best"], rows)


def forgetting_table(reports):
    rows = []
    for name, report in reports:
        run = report["runs"][0]
        before, after = run["base_losses"][0][1], run["base_losses"][-1][1]
        rows.append([name, nats(run["best_loss"]), nats(before), nats(after), ratio(after, before)])
    return table(["finetuning", "tales, best", "books, before", "books, after", "perplexity of before"], rows)


def spam_table(report):
    rows = []
    for own, scratch in pairs(report):
        a, b = own["classes"], scratch["classes"]
        rows.append([share(own["data_share"]), nats(own["best_loss"]), nats(scratch["best_loss"]),
                     f"{100 * a['accuracy']:.2f} %", f"{100 * b['accuracy']:.2f} %",
                     f"{a['macro_f1']:.4f}", f"{b['macro_f1']:.4f}"])
    return table(["training data", "loss, pretrained", "loss, from scratch", "accuracy, pretrained", "from scratch",
                  "macro-F1, pretrained", "from scratch"], rows)


def confusion(classes):
    head = ["label", *(f"as {label}" for label in classes["labels"])]
    return table(head, [[label, *counts] for label, counts in zip(classes["labels"], classes["confusion"])])


def page(tales, replay, lora, spam):
    best = tales["runs"][0]
    return f"""# What pretraining was worth

Two experiments, made by `python3 bench/transfer.py --books DIR --tales DIR --spam FILE`, which writes this page. A `llama` of
four layers, 192 wide, with a context of 128 tokens and a vocabulary of 2,048, was trained for 1,200 steps of 4,096 tokens on 89
English books (38 MB). Then it was finetuned, and the same model was trained from random weights on the same data with the
same budget, at the rate that the books were trained with. Losses are nats per token on held-out text, or per sample.

## Books, then Andersen's tales

127 tales (2 MB), 200 steps.

{tales_table(tales)}

![validation losses](transfer-tales.svg)

What it cost of the old text, with and without replay (a tenth of the samples are from the books), and as adapters of rank 8:

{forgetting_table([("all weights", tales), ("all weights, `--replay 0.1`", replay), ("`--lora 8`", lora)])}

## Spam

5,574 text messages, 13 % of them spam, 60 steps.

{spam_table(spam)}

![validation losses](transfer-spam.svg)

What the classifier from the pretrained start, on all data, took its {sum(map(sum, spam['runs'][0]['classes']['confusion']))} validation samples for:

{confusion(spam['runs'][0]['classes'])}

## Samples

{samples([("tales", tales)])}
The runs are `{best['run']}` and those beside it; `cohort verify RUN` checks each.
"""


def samples(reports):
    text = ""
    for name, report in reports:
        for sample in report["samples"]:
            quote = lambda words: " ".join(words.split())
            text += f"After `{quote(sample['prompt'])}`, greedily:\n\n"
            text += f"- before: {quote(sample['before'])}\n- after the {name}: {quote(sample['after'])}\n\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", required=True, help="text to pretrain on")
    parser.add_argument("--tales", required=True, help="text to finetune on")
    parser.add_argument("--spam", required=True, help="JSON lines with `text` and `label`")
    parser.add_argument("--cohort", default=str(ROOT / "target/release/cohort"))
    parser.add_argument("--home", default=str(ROOT / "target/transfer"), help="where the runs are kept")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    lab = Lab(args)
    lab.pretrain(args.books)
    tales = lab.finetune("tales", TALES, "--corpus", args.tales, "--shares", "1,0.3,0.1")
    replay = lab.finetune("tales-replay", TALES, "--corpus", args.tales, "--replay", "0.1")
    lora = lab.finetune("tales-lora", [*TALES, "train.learning_rate=2e-3"], "--corpus", args.tales, "--lora", "8")
    spam = lab.finetune("spam", SPAM, "--classify", args.spam, "--shares", "1,0.2,0.05")
    for name in ["tales", "spam"]:
        shutil.copy(Path(args.home) / "reports" / name / "transfer.svg", args.out / f"transfer-{name}.svg")
    (args.out / "transfer.md").write_text(page(tales, replay, lora, spam))
    print(f"wrote {args.out / 'transfer.md'}", file=sys.stderr)


if __name__ == "__main__":
    main()
