"""Methods that take patches away and look at what the model says then: forward passes alone.

Each function is `(model, params, inputs, target, **options) -> (maps [B, gh, gw], details)`. All but `token_dropping`
need nothing of a Transformer: they work on any module that gives logits. Of texts, the word pieces are the patches:
the model's mask stands in for one taken away, and marks such as [CLS] always stay. All samples see the same coalitions
of patches (`tokentm_jax.maths.perturbation`), so a map depends on its sample and on `seed`, and on nothing else of the
batch.
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
from tokentm_jax.methods.gradient import MOST, Explanation
from tokentm_jax.models.bert import Bert
from tokentm_jax.models.vit import ViT
from tokentm_jax.programs.model import Model

Count = Annotated[int, Ge(1), Le(MOST)]
Chunk = Annotated[int, Ge(1), Le(4096)]
Seed = Annotated[int, Ge(0), Lt(2**31)]
FORWARD = ("__call__", "setup", "block")  # what makes a forward pass known; `embed` and `classify` are called
CACHED = 2048  # patches, of all samples together, that a CPU computes at a time
Value = Literal["logit", "probability"]


def _black(mean: Sequence[float], std: Sequence[float]) -> tuple[float, ...]:
    """The colour that black has after normalisation."""
    return tuple(-m / s for m, s in zip(mean, std, strict=True))


@dataclasses.dataclass(frozen=True)
class Removal:
    """How patches are removed, and what is read of the model then.

    Args:
      value: of a coalition: the logit of the class, or its probability.
      fill: what stands where patches were: the data's mean colour (zero after normalisation), black, or the image
        itself, blurred.
      black: the colour that black has after normalisation; ImageNet's if it is not said.
      patch: side of the squares that are removed, in pixels; None: the model's patches.
      chunk: so many coalitions of every sample go through the model at a time, which bounds the memory; None: 8, or
        less on a CPU, see `_suited`.
    """

    value: Value = "logit"
    fill: Literal["mean", "black", "blur"] = "mean"
    black: tuple[float, ...] = _black(**IMAGENET)
    patch: Annotated[int, Ge(1)] | None = None
    chunk: Chunk | None = None


def with_black(options: Mapping[str, Any], preprocessing: Any) -> Mapping[str, Any]:
    """Options of `Removal` with the colour that black has after this preprocessing, where it is asked for."""
    if options.get("fill") != "black" or "black" in options or not hasattr(preprocessing, "mean"):
        return options
    return {**options, "black": _black(preprocessing.mean, preprocessing.std)}


class Game(NamedTuple):
    """What a batch plays: `values` are those of coalitions [S, n] -> [B, S], and `full` [B] is that of all patches."""

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
    """`function` of every item [S, ...] -> [S, ...], `chunk` of them at a time; the last chunk is filled up."""
    size = min(chunk, len(items))
    padding = jnp.broadcast_to(items[:1], (-len(items) % size, *items.shape[1:]))
    chunks = jnp.concatenate([items, padding]).reshape(-1, size, *items.shape[1:])
    found = jax.lax.map(jax.vmap(function), chunks)
    return found.reshape(-1, *found.shape[2:])[: len(items)]


def _samples(inputs: Any) -> int:
    return of(inputs).values.shape[0]


def _suited(chunk: int | None, samples: int, patches: int) -> int:
    """The chunk that is asked for, or 8. A CPU is fastest where what it computes at a time fits into its caches."""
    if chunk is not None:
        return chunk
    known = isinstance(samples, int)  # and not the symbol of an exported batch
    return 8 if jax.default_backend() != "cpu" or not known else min(8, max(1, CACHED // (samples * patches)))


def _valued(outputs: Any, target: Any, value: Value) -> Array:
    """The score [B] that a coalition has, or the probability of the class."""
    outputs = jax.tree.map(wide, outputs)
    if value == "probability":
        if isinstance(target, Question):
            raise InputError("option 'value': 'probability' is that of a class; with a score of your own leave it out")
        outputs = jax.nn.softmax(outputs)
    return explained(outputs, target)[0]


def game(model: Model, params: Any, inputs: Any, target: Any, options: Removal) -> Game:
    """The game of the parts of inputs: patches of images, word pieces of texts. Hidden ones are filled as `options`
    specify."""
    grid, hide = of(inputs).parts(model, params, options)
    logits = model.apply({"params": params}, inputs)
    details = explained(logits, target)[1]
    chosen = details["target"]

    def value(mask: Array) -> Array:
        return _valued(model.apply({"params": params}, hide(mask)), chosen, options.value)

    def values(masks: Array) -> Array:
        return in_chunks(value, masks, _suited(options.chunk, _samples(inputs), math.prod(grid))).T

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
    """Mean loss [B, n] by what was removed [S, n], from values [B] and [B, S]."""
    return jax.vmap(mean_by_patch, (None, 0))(removed, full[:, None] - values)


def occlusion(
    model: Model,
    params: Any,
    inputs: Any,
    target: Any,
    *,
    options: Removal,
    window: Count = 1,
    stride: Count = 1,
) -> Explanation:
    """Occlusion (Zeiler & Fergus, ECCV 2014): what is lost when a window of patches is removed; signed.

    Windows have `window` x `window` patches and begin `stride` patches apart; the last ones end at the border. A
    patch has the mean loss of the windows that it is in.
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
    """Occlusion whose patches leave the sequence (Jain et al., ICLR 2022), so nothing stands in for them; signed.

    The other tokens keep their position embeddings. The embedding is computed once. Options are those of `occlusion`,
    less what stands in. Raises InputError for a module whose forward pass is not that of `ViT` or `Bert`, and for
    rotary positions.
    """
    module: Any = model.source.module
    home = next((kind for kind in (ViT, Bert) if isinstance(module, kind)), None)
    if home is None or any(getattr(type(module), name) is not getattr(home, name) for name in FORWARD):
        raise Unfit(
            "the method 'token_dropping' takes tokens out of the sequence, so it needs a module with the forward pass "
            f"of tm.models.ViT; {model.source.name} has its own"
        )
    if getattr(module, "rope_type", None) is not None:
        raise Unfit("the method 'token_dropping' needs blocks that do not know a token's place: no rotary positions")
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
    """RISE (Petsiuk et al., BMVC 2018): a patch has the mean value of the random masks that show it.

    `S_j = sum_i v(m_i) m_ij / sum_i m_ij`, whose denominator is the masks' own sum in place of its mean
    `samples keep`, so a constant value gives a constant map. Masks are smooth, from `cells` x `cells` bits that are 1
    with probability `keep`, and constant within a patch; between shown and removed, a patch is mixed with what stands
    in for it.
    """
    _require_grid(inputs, "the method 'rise' draws smooth masks over a grid of patches, and texts have none")
    played = game(model, params, inputs, target, options)
    masks = smooth_masks(jax.random.key(seed), played.grid, samples, cells, keep)
    return played.maps(jax.vmap(mean_by_patch, (None, 0))(masks, played.values(masks))), played.details


def _with_errors(played: Game, empty: Array, rows: Array, errors: Array) -> Explanation:
    found = {"standard_error": played.maps(errors), "full_value": played.full, "empty_value": empty}
    return played.maps(rows), {**played.details, **found}


def _check_players(played: Game) -> None:
    if played.patches < 2:
        raise InputError("Shapley values need two patches at least: the option 'patch' is the whole image")


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
    """Shapley values of the patches (Castro et al., 2009): what a patch adds, over random orders of arrival; signed.

    Orders come in `pairs`, each with its reverse (antithetic; Mitchell et al., JMLR 2022). A map sums to
    `details["full_value"]` less `details["empty_value"]` [B], for any number of pairs. `details["standard_error"]`
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

    Coalitions are drawn in `pairs`, each with its complement; where there are no more pairs than that, all of them are
    taken, and the values are exact. The details are those of `shapley`; standard errors of exact values are zero.
    Raises InputError for fewer pairs than twice the patches, where the fit would have no sure solution.
    """
    _require_grid(inputs, "the method 'kernel_shap' weighs coalitions by the number of patches, which texts differ in")
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
