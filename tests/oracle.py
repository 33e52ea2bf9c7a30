"""Slow float64 loops, written from the definitions and sharing nothing with the library."""

import numpy as np


def norm2(x):
    return float(np.sqrt(np.sum(np.asarray(x, np.float64) ** 2)))


def effective_channels(x):
    """exp of the entropy of the shares of the squared channels."""
    shares = [value**2 / norm2(x) ** 2 for value in x]
    return np.exp(-sum(s * np.log(s) for s in shares if s > 0))


def other_weights(name, original, transformed, gradient):
    """The weights of `tokentm_jax.maths.weights`, or of a function."""
    if callable(name):
        return np.asarray(name(original, transformed), np.float64)
    if name == "entropy":
        return np.array(
            [effective_channels(t) / effective_channels(o) for o, t in zip(original, transformed, strict=True)]
        )
    if name == "alignment":
        lengths = np.array([norm2(t) / norm2(o) for o, t in zip(original, transformed, strict=True)])
        return lengths * token_weights(gradient, transformed, length=False)
    means = np.mean(original, 0), np.mean(transformed, 0)
    return np.array([norm2(t - means[1]) / norm2(o - means[0]) for o, t in zip(original, transformed, strict=True)])


def token_weights(original, transformed, length=True, direction="necc"):
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
        elif direction in ("necc", "softmax"):
            total = sum(np.exp(c) for c in cosines)
            w[j] *= np.exp(cosines[j]) / (total if direction == "softmax" else total / n)
    return w


def full_map(
    blocks,
    embedded,
    length=True,
    direction="necc",
    initialise=True,
    ffn=True,
    attention="gradient",
    heads="sum",
    original="residual",
    transformed="value",
    ffn_transformed="branch",
    norms=True,
    weights=None,
    first_block=0,
    end_block=None,
):
    """C of TokenTM for one sample, by the recursion from the first block to the last with [N, N] products.

    Blocks that have `middle` and `after` are post-norm ones.

    What each head makes of each token is written out, [H, N, D]; `transformed_value` of the blocks is not looked at.
    """
    get = {k: np.asarray(v, np.float64) for k, v in blocks.items()}
    embedded = np.asarray(embedded, np.float64)
    depth, count, n, _ = get["attention"].shape
    c = np.diag([norm2(x) for x in embedded]) if initialise else np.eye(n)
    for l in range(depth)[first_block:end_block]:
        x = get["tokens"][l] if original == "residual" else get["normalised"][l]
        summed = middle = get["tokens"][l] + get["attention_branch"][l]
        if "middle" in get:
            middle = get["middle"][l]

        def weigh(before, after, l=l):
            if weights is None:
                return token_weights(before, after, length, direction)
            return other_weights(weights, before, after, get.get("output_grad", get["tokens"])[l])

        made = []  # of each token by each head, [N, D]
        for h in range(count):
            own = slice(h * get["value"].shape[-1], (h + 1) * get["value"].shape[-1])
            value = get["value"][l, h] if transformed == "value" else x @ get["value_kernel"][l][:, own]
            made.append(value @ get["output_kernel"][l][own])
        together = summed if transformed == "stream" else sum(made)
        by_head = np.zeros((3, n, n))  # mean over heads of: (G A)+ W, A W, G+
        for h in range(count):
            w = np.diag(weigh(x, made[h] if heads == "each" else together))
            a, g = get["attention"][l, h], get["attention_grad"][l, h]
            by_head += np.stack([np.maximum(g * a, 0) @ w, a @ w, np.maximum(g, 0)]) / count
        mean = {"gradient": by_head[0], "plain": by_head[1], "means": by_head[2] * by_head[1]}[attention]
        c = (np.eye(n) + mean) @ c
        if "middle" in get and norms:
            c = np.diag([norm2(a) / norm2(b) for a, b in zip(middle, summed, strict=True)]) @ c
        if ffn:
            after = get["ffn_branch"][l] + (middle if ffn_transformed == "stream" else 0)
            c = (np.eye(n) + np.diag(weigh(middle, after))) @ c
        if "after" in get and norms:
            summed = middle + get["ffn_branch"][l]
            c = np.diag([norm2(a) / norm2(b) for a, b in zip(get["after"][l], summed, strict=True)]) @ c
    return c


def layer_norm(x, p, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def erf(x):
    from math import erf as one

    return np.vectorize(one)(x)


def vit(module, params, image, change=None, read_block=None, patches_left=None, held=None, mean=False):
    """Logits [classes] of one normalised image [H, W, 3] by a plain class-token ViT, in float64.

    `change` maps (name, block) to what is added to "tokens", "normalised", "attention" or the result of a linear map
    or norm there; `read_block` reads the head after that block already, and `mean` gives it the
    mean of all tokens instead of the class token; `patches_left` are the patches whose tokens
    enter the first. `held`, values of another run, are what the softmax, the deviations of the norms and the gates of
    GELU give in place of their own. Also returns all values by (name, block).
    """
    change, seen = change or {}, {}

    def constant(name, l, value):
        seen[name, l] = value
        return value if held is None else held[name, l]

    def norm(name, l, x, p):
        deviation = constant(f"{name} deviation", l, np.sqrt(x.var(-1, keepdims=True) + module.norm_eps))
        return (x - x.mean(-1, keepdims=True)) / deviation * p["scale"] + p["bias"]

    def point(name, l, value):
        value = value + change.get((name, l), 0)
        seen[name, l] = value
        return value

    p = module.patch_size
    gh, gw = module.grid
    patches = [image[i * p : (i + 1) * p, j * p : (j + 1) * p].reshape(-1) for i in range(gh) for j in range(gw)]
    tokens = np.stack(patches) @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"]
    x = np.concatenate([params["cls_token"][0], tokens]) + params["pos_embed"][0]
    if patches_left is not None:
        x = np.stack([x[0], *(x[1 + j] for j in patches_left)])
    d = x.shape[1]
    width = d // module.num_heads
    for l in range(module.depth):
        b = {k: {m: {q: a[l] for q, a in v.items()} for m, v in params["blocks"][k].items()} for k in ("attn", "mlp")}
        norms = [{q: a[l] for q, a in params["blocks"][k].items()} for k in ("norm1", "norm2")]
        x = point("tokens", l, x)
        y = point("normalised", l, norm("norm1", l, x, norms[0]))
        qkv = point("qkv", l, y @ b["attn"]["qkv"]["kernel"] + b["attn"]["qkv"]["bias"])
        heads, attention = [], []
        for h in range(module.num_heads):
            query, key, value = (qkv[:, i * d + h * width : i * d + (h + 1) * width] for i in range(3))
            e = np.exp(query @ key.T / np.sqrt(width))
            attention.append(e / e.sum(-1, keepdims=True))
            heads.append(value)
        attention = point("attention", l, constant("softmax", l, np.stack(attention)))
        seen["value_projected", l] = np.concatenate(heads, -1) @ b["attn"]["proj"]["kernel"]
        mixed = np.concatenate([a @ v for a, v in zip(attention, heads, strict=True)], -1)
        x = x + point("proj", l, mixed @ b["attn"]["proj"]["kernel"] + b["attn"]["proj"]["bias"])
        y = point("norm2", l, norm("norm2", l, x, norms[1]))
        y = point("fc1", l, y @ b["mlp"]["fc1"]["kernel"] + b["mlp"]["fc1"]["bias"])
        y = y * constant("gate", l, 0.5 * (1 + erf(y / np.sqrt(2))))
        x = x + point("fc2", l, y @ b["mlp"]["fc2"]["kernel"] + b["mlp"]["fc2"]["bias"])
        if read_block == l:
            break
    if mean:
        x = x.mean(0, keepdims=True)
    x = point("norm", None, norm("norm", None, x, params["norm"]))
    return x[0] @ params["head"]["kernel"] + params["head"]["bias"], seen


def difference_quotients(function, shape, step=1e-5):
    """Gradient of a number with respect to what is added to an array of `shape`, one entry at a time."""
    gradient = np.zeros(shape)
    for i in np.ndindex(*shape):
        delta = np.zeros(shape)
        delta[i] = step
        gradient[i] = (function(delta) - function(-delta)) / (2 * step)
    return gradient
