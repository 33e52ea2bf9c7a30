"""Methods that remove patches and read the model's output, with forward passes only.

Each function is `(model, params, inputs, target, **options) -> (maps [B, gh, gw], details)`. All except
`token_dropping` work on any module that gives logits. The patches of a text are its word pieces: the model's mask
replaces a removed one, and marks such as [CLS] are never removed. All samples get the same coalitions of patches
(`tokentm_jax.maths.perturbation`), so a map depends only on its sample and on `seed`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Le, Lt
from jax import Array

from tokentm_jax.errors import InputError, Unfit
from tokentm_jax.inputs.images import IMAGENET
from tokentm_jax.inputs.values import of
from tokentm_jax.inputs.values import values as values_of
from tokentm_jax.maths.perturbation import (
    half_of_coalitions,
    kernel_coalitions,
    kernel_shap,
    marginals,
    mean_by_patch,
    path,
    smooth_masks,
    windows,
)
from tokentm_jax.maths.primitives import wide
from tokentm_jax.maths.scores import Question, explained
from tokentm_jax.methods.attention import Block
from tokentm_jax.methods.gradient import MOST, Explanation
from tokentm_jax.models.bert import Bert
from tokentm_jax.models.vit import ViT
from tokentm_jax.programs.capture import capture, check_blocks
from tokentm_jax.programs.model import Model
from tokentm_jax.programs.passes import with_tokens

Count = Annotated[int, Ge(1), Le(MOST)]
Chunk = Annotated[int, Ge(1), Le(4096)]
Seed = Annotated[int, Ge(0), Lt(2**31)]
FORWARD = ("__call__", "setup", "block")  # a subclass that changes these has another forward pass
CACHED = 2048  # patches of all samples together that a CPU computes at a time
Value = Literal["logit", "probability"]
Fill = Literal["mean", "black", "blur"]


def _black(mean: Sequence[float], std: Sequence[float]) -> tuple[float, ...]:
    """Black after normalisation."""
    return tuple(-m / s for m, s in zip(mean, std, strict=True))


@dataclasses.dataclass(frozen=True)
class Removal:
    """How patches are removed, and which output of the model is read.

    Args:
      value: of a coalition: the logit of the class, or its probability.
      fill: what replaces removed patches: the data's mean colour (zero after normalisation), black, or the blurred
        image.
      black: the colour black after normalisation; by default with ImageNet's statistics.
      patch: side of the removed squares in pixels; None: the model's patches.
      chunk: number of coalitions of every sample in one batch, which limits the memory; None: 8, or less on a CPU, see
        `_suited`.
    """

    value: Value = "logit"
    fill: Fill = "mean"
    black: tuple[float, ...] = _black(**IMAGENET)
    patch: Annotated[int, Ge(1)] | None = None
    chunk: Chunk | None = None


def with_black(options: Mapping[str, Any], preprocessing: Any) -> Mapping[str, Any]:
    """Options of `Removal` with the colour of black for this preprocessing, if they use black."""
    if options.get("fill") != "black" or "black" in options or not hasattr(preprocessing, "mean"):
        return options
    return {**options, "black": _black(preprocessing.mean, preprocessing.std)}


class Game(NamedTuple):
    """The game of a batch: `values` of coalitions [S, n] -> [B, S], and the value `full` [B] of all patches."""

    values: Callable[[Array], Array]
    full: Array
    grid: tuple[int, int]
    details: dict[str, Array]

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def empty(self) -> Array:
        """The value of no patch, [B]."""
        return self.values(jnp.zeros((1, self.patches), bool))[:, 0]

    def maps(self, rows: Array) -> Array:
        """Rows over patches [B, n] -> [B, gh, gw]."""
        return rows.reshape(-1, *self.grid)


def in_chunks(function: Callable[[Array], Array], items: Array, chunk: int) -> Array:
    """`function` of every item [S, ...] -> [S, ...], `chunk` of them at a time; the last chunk is padded."""
    size = min(chunk, len(items))
    padding = jnp.broadcast_to(items[:1], (-len(items) % size, *items.shape[1:]))
    chunks = jnp.concatenate([items, padding]).reshape(-1, size, *items.shape[1:])
    found = jax.lax.map(jax.vmap(function), chunks)
    return found.reshape(-1, *found.shape[2:])[: len(items)]


def _suited(chunk: int | None, samples: int, patches: int) -> int:
    """The given chunk, or 8. A CPU is fastest if a batch fits into its caches."""
    if chunk is None and jax.default_backend() == "cpu" and isinstance(samples, int):  # no symbol of an export
        return min(8, max(1, CACHED // (samples * patches)))
    return chunk or 8


def _read(outputs: Any, target: Any, value: Value) -> Any:
    """The outputs as the score reads them: logits, or probabilities."""
    outputs = jax.tree.map(wide, outputs)
    if value == "probability" and isinstance(target, Question):
        raise InputError("option 'value': 'probability' is for classes; leave it out with a custom score")
    return jax.nn.softmax(outputs) if value == "probability" else outputs


def _valued(outputs: Any, target: Any, value: Value) -> Array:
    """The score [B] of a coalition, or the probability of the class."""
    return explained(_read(outputs, target, value), target)[0]


def game(model: Model, params: Any, inputs: Any, target: Any, options: Removal) -> Game:
    """The game of the parts of inputs: patches of images, or word pieces of texts. `options` specify what replaces
    removed parts."""
    grid, hide = of(inputs).parts(model, params, options)
    logits = model.apply({"params": params}, inputs)
    details = explained(logits, target)[1]
    chosen = details["target"]

    def value(mask: Array) -> Array:
        return _valued(model.apply({"params": params}, hide(mask)), chosen, options.value)

    def values(masks: Array) -> Array:
        return in_chunks(value, masks, _suited(options.chunk, of(inputs).values.shape[0], math.prod(grid))).T

    return Game(values, _valued(logits, chosen, options.value), grid, details)


def _require_grid(inputs: Any, reason: str) -> None:
    if not of(inputs).regular:
        raise Unfit(reason)


def _windows(inputs: Any, grid: tuple[int, int], window: int, stride: int) -> Array:
    if window > 1:
        _require_grid(inputs, "option 'window' is for grids of patches: words are removed one by one")
    if window > min(grid):
        raise InputError(
            f"option 'window' must be at most {min(grid)} for {grid[0]} x {grid[1]} patches, got {window}"
        )
    if stride > window:
        raise InputError(f"option 'stride' must be at most the window ({window}), got {stride}")
    return windows(grid, window, stride)


def _losses(full: Array, values: Array, removed: Array) -> Array:
    """Mean loss [B, n] of each patch over the coalitions without it, `removed` [S, n], from values [B] and [B, S]."""
    return jax.vmap(mean_by_patch, (None, 0))(removed, full[:, None] - values)


def occlusion(
    model: Model, params: Any, inputs: Any, target: Any, *, options: Removal, window: Count = 1, stride: Count = 1
) -> Explanation:
    """Occlusion (Zeiler & Fergus, ECCV 2014): the loss when a window of patches is removed; signed.

    Windows have `window` x `window` patches, at a distance of `stride` patches; the last ones end at the border. A
    patch has the mean loss of the windows that contain it.
    """
    played = game(model, params, inputs, target, options)
    removed = _windows(inputs, played.grid, window, stride)
    return played.maps(_losses(played.full, played.values(~removed), removed)), played.details


def token_dropping(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    window: Count = 1,
    stride: Count = 1,
    value: Value = "logit",
    chunk: Chunk | None = None,
) -> Explanation:
    """Occlusion by removing tokens from the sequence (Jain et al., ICLR 2022), without a replacement; signed.

    The other tokens keep their position embeddings. The embedding is computed once. Options are those of `occlusion`
    without a fill. Raises InputError for a module whose forward pass is not that of `ViT` or `Bert`, and for rotary
    positions.
    """
    module: Any = model.source.module
    home = next((kind for kind in (ViT, Bert) if isinstance(module, kind)), None)
    if home is None or any(getattr(type(module), name) is not getattr(home, name) for name in FORWARD):
        raise Unfit(
            "the method 'token_dropping' removes tokens from the sequence, so it needs a module with the forward pass "
            f"of tm.models.ViT; {model.source.name} has another one"
        )
    if getattr(module, "rope_type", None) is not None:
        raise Unfit("the method 'token_dropping' does not support rotary positions")
    tokens: Any = module.apply({"params": params}, inputs, method="embed")
    grid: Any = module.grid or (1, tokens.shape[1])
    removed = _windows(inputs, grid, window, stride)
    left = removed.shape[1] - window * window
    if not left:
        raise InputError("the method 'token_dropping' must leave a patch: the window is the whole grid")

    def read(kept: Array, count: int) -> Any:
        return module.apply({"params": params}, tokens, of(inputs).remaining(kept), count, method="read_part")

    logits = read(jnp.ones(removed.shape[1], bool), removed.shape[1])
    details = explained(logits, target)[1]
    chosen = details["target"]

    def remaining(gone: Array) -> Array:
        return _valued(read(~gone, left), chosen, value)

    values = in_chunks(remaining, removed, _suited(chunk, tokens.shape[0], left)).T
    rows = _losses(_valued(logits, chosen, value), values, removed)
    return rows.reshape(-1, *grid), details


def rise(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    options: Removal,
    samples: Count = 1000,
    cells: Annotated[int, Ge(2), Le(1000)] = 7,
    keep: Annotated[float, Gt(0), Lt(1)] = 0.5,
    seed: Seed = 0,
) -> Explanation:
    """RISE (Petsiuk et al., BMVC 2018): the map of a patch is the mean value of the random masks that show it.

    `S_j = sum_i v(m_i) m_ij / sum_i m_ij`. The denominator is the sum of the masks instead of its expectation
    `samples keep`, so a constant value gives a constant map. Masks are smooth, made from `cells` x `cells` bits that
    are 1 with probability `keep`, and constant within a patch. A patch with a mask between 0 and 1 is mixed with its
    replacement.
    """
    _require_grid(inputs, "the method 'rise' draws smooth masks over a grid of patches, and texts have no grid")
    played = game(model, params, inputs, target, options)
    masks = smooth_masks(jax.random.key(seed), played.grid, samples, cells, keep)
    return played.maps(jax.vmap(mean_by_patch, (None, 0))(masks, played.values(masks))), played.details


def _with_errors(played: Game, empty: Array, rows: Array, errors: Array) -> Explanation:
    found = {"standard_error": played.maps(errors), "full_value": played.full, "empty_value": empty}
    return played.maps(rows), {**played.details, **found}


def _check_players(played: Game) -> None:
    if played.patches < 2:
        raise InputError("Shapley values need at least two patches: the option 'patch' is the whole image")


def shapley(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    options: Removal,
    pairs: Annotated[int, Ge(2), Le(MOST)] = 8,
    seed: Seed = 0,
) -> Explanation:
    """Shapley values of the patches (Castro et al., 2009): the mean gain of a patch over random orders; signed.

    Orders are drawn in `pairs`, each with its reverse (antithetic; Mitchell et al., JMLR 2022). The sum of a map is
    `details["full_value"]` minus `details["empty_value"]` [B], for any number of pairs. `details["standard_error"]`
    [B, gh, gw] is that of the mean over pairs.
    """
    played = game(model, params, inputs, target, options)
    _check_players(played)
    empty, n = played.empty(), played.patches

    def pair(key: Array) -> Array:
        if of(inputs).regular:
            ranks = jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))
        else:  # the order of a text's own words does not depend on the length of its padding
            ranks = jax.random.uniform(key, (n,)).argsort().argsort().astype(jnp.int32)
        both = jnp.stack([ranks, n - 1 - ranks])
        found = played.values(jax.vmap(path)(both).reshape(-1, n)).reshape(-1, 2, n - 1)
        first, last = (jnp.broadcast_to(end[:, None, None], (end.shape[0], 2, 1)) for end in (empty, played.full))
        values = jnp.concatenate([first, found, last], 2)  # [B, 2, n + 1]
        return jax.vmap(jax.vmap(marginals), (0, None))(values, both).mean(1)

    added = jax.lax.map(pair, jax.random.split(jax.random.key(seed), pairs))  # [pairs, B, n]
    return _with_errors(played, empty, added.mean(0), added.std(0, ddof=1) / pairs**0.5)


def shapley_by_kernel(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    options: Removal,
    pairs: Annotated[int, Ge(2), Le(MOST)] = 1000,
    seed: Seed = 0,
) -> Explanation:
    """KernelSHAP (Lundberg & Lee, NeurIPS 2017): Shapley values of the patches as a least-squares fit; signed.

    Coalitions are drawn in `pairs`, each with its complement. If all coalitions are not more pairs than that, all are
    used, and the values are exact. The details are those of `shapley`; standard errors of exact values are zero.
    Raises InputError for fewer pairs than twice the patches, because the fit may then have no unique solution.
    """
    _require_grid(
        inputs, "the method 'kernel_shap' weighs coalitions by one number of patches, and texts differ in it"
    )
    played = game(model, params, inputs, target, options)
    _check_players(played)
    empty, n = played.empty(), played.patches
    exact = 2 ** (n - 1) - 1 <= pairs
    if exact:
        masks, weights = half_of_coalitions(n)
    elif pairs < 2 * n:
        raise InputError(f"option 'pairs' must be at least {2 * n} for {n} patches, got {pairs}")
    else:
        masks, weights = kernel_coalitions(jax.random.key(seed), n, pairs), jnp.ones(pairs)
    values = played.values(jnp.concatenate([masks, ~masks])).reshape(-1, 2, len(masks)).swapaxes(1, 2)
    rows, errors = jax.vmap(kernel_shap, (None, None, 0, 0, 0))(masks, weights, values, empty, played.full)
    return _with_errors(played, empty, rows, jnp.zeros_like(errors) if exact else errors)


class _Order(NamedTuple):
    """An order of patches [n] while it is made."""

    shown: Array  # [n] the first patches
    reward: Array  # of these
    gains: Array  # [n] what each patch added to the reward when it was last tried
    rank: Array  # [n] from 0, the most important


def metric_driven(
    model: Model, params: Any, inputs: Any, target: Any, *, options: Removal, candidates: Count = 8
) -> Explanation:
    """MDA (Walker et al., ICLR 2025): the order of patches that insertion and deletion reward, found greedily.

    It is a bound for metrics of removal: it shows what they can be made to say, and is no evidence of its own. The
    reward of the first patches S is `v(S) - v(all others)`, so the mean over S is insertion minus deletion. Each step
    adds the patch with the highest reward. It tries `candidates`: the patches that added most when they were last
    tried. The values of a map are positions in the order: 1, (n - 1) / n ... 1 / n.
    """
    grid, _ = of(inputs).parts(model, params, options)
    n = math.prod(grid)
    chosen = explained(model.apply({"params": params}, inputs), target)[1]["target"]
    chunk = _suited(options.chunk, values_of(inputs).shape[0], n)
    patches = jnp.arange(n, dtype=jnp.int32)

    def one(sample: Any, score: Callable[[Any], Array]) -> tuple[Array, Any]:
        batch = jax.tree.map(lambda a: a[None], sample)
        hide = of(batch).parts(model, params, options)[1]
        kept = of(batch).removable
        kept = jnp.ones(n, bool) if kept is None else kept.reshape(n)

        def answer(inputs: Any) -> Any:
            return jax.tree.map(lambda a: a[0], model.apply({"params": params}, inputs))

        def value(shown: Array) -> Array:
            return score(_read(answer(hide(shown)), chosen, options.value))

        def rewards(shown: Array, which: Array) -> Array:
            with_each = shown | (patches == which[:, None])
            return jnp.subtract(*in_chunks(value, jnp.concatenate([with_each, ~with_each]), chunk).reshape(2, -1))

        def step(order: _Order, number: Array) -> tuple[_Order, None]:
            free = kept & ~order.shown
            gains = jnp.where(free, order.gains, -jnp.inf)
            which = jnp.argsort(gains, descending=True, stable=True)[:candidates].astype(jnp.int32)
            tried = patches == which[:, None]  # [candidates, n]; no indices, so that shards of a batch stay apart
            found = rewards(order.shown, which)
            best = jnp.where((tried & free).any(1), found, -jnp.inf).argmax() == jnp.arange(len(which))
            added = (tried & best[:, None]).any(0) & free
            gained = jnp.where(tried, (found - order.reward)[:, None], 0).sum(0)
            return _Order(
                order.shown | added,
                jnp.where(added.any(), jnp.where(best, found, 0).sum(), order.reward),
                jnp.where(tried.any(0), gained, order.gains),
                jnp.where(added, number, order.rank),
            ), None

        none, outputs = jnp.zeros(n, bool), answer(batch)
        start = value(none) - score(_read(outputs, chosen, options.value))
        order = _Order(none, start, rewards(none, patches) - start, jnp.zeros(n, jnp.int32))
        count = kept.sum(dtype=jnp.int32)
        rank = jax.lax.scan(step, order, patches)[0].rank
        return jnp.where(kept, (count - rank) / count, 0), outputs

    maps, details = model.per_sample(one, inputs, chosen)
    return wide(maps).reshape(-1, *grid), details


def caap(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    first_block: Block | None = None,
    end_block: Block | None = None,
    value: Value = "logit",
    fill: Fill = "mean",
    black: tuple[float, ...] = _black(**IMAGENET),
    chunk: Chunk | None = None,
) -> Explanation:
    """CAAP (Izadi et al., 2026): the score of a neutral input when the activations of one patch are put into it.

    The neutral input is the `fill` everywhere. From `first_block` to before `end_block`, the token that enters a block
    at the patch is that of the explained input; all other values follow. None leaves out the first and last quarter of
    the blocks. `details["empty_value"]` [B] is the score of the neutral input.
    """
    depth = model.structure.depth
    first = depth // 4 if first_block is None else first_block
    end = max(depth - depth // 4, first + 1) if end_block is None else end_block
    check_blocks(model, first, end)
    if first >= end:
        raise InputError(f"option 'end_block' must be more than 'first_block' ({first}), got {end}")
    grid, hide = of(inputs).parts(model, params, Removal(value, fill, black, None, chunk))
    trace: Any = capture(model, params, inputs, target, ["tokens"])
    patches, prefix = math.prod(grid), model.prefix
    neutral, tokens = hide(jnp.zeros(patches, bool)), jnp.moveaxis(trace.tokens, 0, 1)
    kept = of(inputs).removable
    kept = jnp.ones((tokens.shape[0], patches), bool) if kept is None else kept.reshape(-1, patches)
    blocks = (jnp.arange(depth) >= first) & (jnp.arange(depth) < end)

    def inserted(patch: Array) -> Array:
        def one(sample: Any, tokens: Array, kept: Array) -> Any:
            placed = jnp.zeros(tokens.shape[1], bool).at[prefix : prefix + patches].set(patch & kept)
            return with_tokens(model, params, sample, tokens, blocks[:, None] & placed)

        return _valued(jax.vmap(one)(neutral, tokens, kept), trace.target, value)

    each = jnp.concatenate([jnp.eye(patches, dtype=bool), jnp.zeros((1, patches), bool)])
    values = in_chunks(inserted, each, _suited(chunk, tokens.shape[0], patches)).T
    return values[:, :-1].reshape(-1, *grid), {**trace.details(), "empty_value": values[:, -1]}
