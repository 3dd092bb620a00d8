"""Witten-Bell loss of n-gram models, the plain way: dictionaries of counts. The golden numbers of
`common/src/corpus/baseline/tests.rs` and, with a file as argument, those of that file by characters.

    python3 common/golden/ngram.py [FILE]
"""

import math
import sys
from collections import Counter, defaultdict


def losses(train, validation, vocabulary, orders=5):
    """Nats per scored token for each order. Sides are lists of documents; the first token of each is not scored."""
    counts = defaultdict(Counter)
    for text in train:
        for i in range(1, len(text)):
            for n in range(min(i + 1, orders)):
                counts[tuple(text[i - n : i])][text[i]] += 1
    total, scored = [0.0] * orders, 0
    for text in validation:
        for i in range(1, len(text)):
            p, scored = 1 / vocabulary, scored + 1
            for n in range(orders):
                after = counts.get(tuple(text[i - n : i])) if n <= i else None
                if after:
                    p = (after[text[i]] + len(after) * p) / (sum(after.values()) + len(after))
                total[n] -= math.log(p)
    return [loss / scored for loss in total]


def shown(name, values):
    print(name, ", ".join(f"{value:.12f}" for value in values))


if len(sys.argv) > 1:
    text = open(sys.argv[1], encoding="utf-8").read()
    cut = int(len(text) * 0.9)
    sides = [list(text[:cut]) + ["end"]], [list(text[cut:]) + ["end"]]
    shown(sys.argv[1], losses(*sides, len(set(text)) + 1))
else:
    # Two documents a side; 9 is the end of text, and the vocabulary has 10 tokens.
    train = [[1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2, 4, 5, 9], [2, 3, 1, 2, 3, 9]]
    validation = [[1, 2, 3, 1, 2, 3, 9], [4, 1, 2, 6, 9]]
    shown("tokens", losses(train, validation, 10))
