"""Writes blocks.json: what the formula in `floats/blocks.rs` makes of some values, in NumPy and by itself.

    pip install numpy
    python blocks.py
"""

import json
from pathlib import Path

import numpy as np

BLOCK, KEY, PLACE = 64, 0x0123456789ABCDEF, 5 * 64
U64 = 1 << 64


def split_mix(key, number):
    z = (key + number * 0x9E3779B97F4A7C15) % U64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % U64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) % U64
    return z ^ z >> 31


def rounded(bits, block, place):
    """The exponent, the whole numbers, and the values."""
    if not np.isfinite(block).all():
        return -128, np.zeros(len(block), np.int8), np.full(len(block), np.nan, np.float32)
    most = np.abs(block).max().astype(np.float64)
    exponent = -126
    while most > (2 ** (bits - 1) - 1) * 2.0**exponent:
        exponent += 1
    random = [split_mix(KEY, p // 4) >> 16 * (p % 4) & 0xFFFF for p in range(place, place + len(block))]
    u = (np.array(random) + 0.5) / 65536
    # In f32, as the sum is taken there.
    scaled = (block.astype(np.float64) / 2.0**exponent).astype(np.float32)
    numbers = np.floor(scaled + u.astype(np.float32))
    return exponent, numbers.astype(np.int8), (numbers * np.float64(2.0) ** exponent).astype(np.float32)


def sent_as(bits, values):
    """What travels of values that are rounded: their scales may be smaller now."""
    exponents, numbers = [], []
    for begin in range(0, len(values), BLOCK):
        block = values[begin : begin + BLOCK].astype(np.float64)
        if not np.isfinite(block).all():
            exponents.append(128)
            numbers += [0] * len(block)
            continue
        exponent = -126
        while np.abs(block).max() > (2 ** (bits - 1) - 1) * 2.0**exponent:
            exponent += 1
        exponents.append(exponent % 256)
        numbers += [int(x / 2.0**exponent) % 2**bits for x in block]
    if bits == 4:
        numbers += [0] * (len(numbers) % 2)
        numbers = [low + 16 * high for low, high in zip(numbers[::2], numbers[1::2])]
    return exponents + numbers


random = np.random.default_rng(1)
values = random.normal(size=5 * BLOCK + 7).astype(np.float32) * np.float32(1e-3)
values[BLOCK : 2 * BLOCK] = 0
values[BLOCK + 3] = 1e-40
values[2 * BLOCK] = np.inf
values[3 * BLOCK : 4 * BLOCK] *= np.float32(1e38)
values[4 * BLOCK] = -127 * 2.0**-9
bits_of = lambda x: np.where(np.isnan(x), 0x7FC00000, x.view(np.uint32)).tolist()
golden = {"key": str(KEY), "place": PLACE, "values": bits_of(values)}
for bits in (8, 4):
    parts = [rounded(bits, values[at : at + BLOCK], PLACE + at) for at in range(0, len(values), BLOCK)]
    out = np.concatenate([values for _, _, values in parts])
    golden[str(bits)] = {"rounded": bits_of(out), "sent": sent_as(bits, out)}
Path(__file__).with_name("blocks.json").write_text(json.dumps(golden) + "\n")
