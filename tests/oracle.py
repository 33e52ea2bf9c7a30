"""Slow float64 loops, written from the definitions and sharing nothing with the library."""

import numpy as np


def norm2(x):
    return float(np.sqrt(np.sum(np.asarray(x, np.float64) ** 2)))


def weights(original, transformed, length=True, direction="necc"):
    n = len(original)
    cosines = np.zeros(n)
    for j in range(n):
        product = norm2(original[j]) * norm2(transformed[j])
        cosines[j] = float(np.dot(original[j], transformed[j])) / product if product > 0 else 0.0
    w = np.ones(n)
    for j in range(n):
        if length:
            w[j] *= norm2(transformed[j]) / norm2(original[j]) if norm2(original[j]) > 0 else 0.0
        if direction == "cosine":
            w[j] *= cosines[j]
        elif direction == "necc":
            w[j] *= np.exp(cosines[j]) / (sum(np.exp(c) for c in cosines) / n)
    return w


def full_map(
    blocks,
    embedded,
    length=True,
    direction="necc",
    initialise=True,
    ffn=True,
    attention="gradient",
    original="residual",
    first_block=0,
    end_block=None,
):
    """C of TokenTM for one sample, by the recursion from the first block to the last with [N, N] products."""
    get = {k: np.asarray(v, np.float64) for k, v in blocks.items()}
    embedded = np.asarray(embedded, np.float64)
    depth, heads, n, _ = get["attention"].shape
    c = np.diag([norm2(x) for x in embedded]) if initialise else np.eye(n)
    for l in range(depth)[first_block:end_block]:
        mean = np.zeros((n, n))
        for h in range(heads):
            a = get["attention"][l, h]
            mean += (np.maximum(get["attention_grad"][l, h] * a, 0) if attention == "gradient" else a) / heads
        x = get["tokens"][l] if original == "residual" else get["normalised"][l]
        w = weights(x, get["transformed_value"][l], length, direction)
        c = (np.eye(n) + mean @ np.diag(w)) @ c
        if ffn:
            middle = get["tokens"][l] + get["attention_branch"][l]
            c = (np.eye(n) + np.diag(weights(middle, get["ffn_branch"][l], length, direction))) @ c
    return c
