"""The Transformer in a program: its layers, the tokens that its head reads, and its grid of patches.

layer       a residual sum on the stream: an attention layer if its branch has an attention that its stream lacks
stage       consecutive layers: of the body of a scan, or between scans
read-out    how the head mixes the tokens of the last stream
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from tokentm_jax.errors import Unfit
from tokentm_jax.maths.maps import Tiling
from tokentm_jax.programs.flat import Flat, Step, axis_after, line_of
from tokentm_jax.programs.pieces import query_axis
from tokentm_jax.programs.reading import Reading
from tokentm_jax.programs.tokens import mixture, rows_from


@dataclasses.dataclass(eq=False)
class Attention:
    """The product of attention weights with values."""

    product: Step
    weights: int  # the value [.., N, .., N] of a softmax
    axes: tuple[int, ...]  # of the weights: heads, heads in groups that share values, queries, keys
    value: int  # the other factor
    order: tuple[int, ...]  # axes of the value: heads (in the order of the weights' axes), tokens, channels
    places: tuple[int, ...]  # axes of the product: heads, heads in groups, tokens, channels
    sizes: tuple[int, ...]  # of these axes of the product

    @property
    def query(self) -> int:
        return self.axes[-2]

    @property
    def key(self) -> int:
        return self.axes[-1]

    @property
    def output(self) -> int:
        return self.product.outputs[0]


@dataclasses.dataclass(eq=False)
class Layer:
    """`output = stream + branch`; values by their numbers."""

    sum: Step
    stream: int
    branch: int
    output: int
    attention: Attention | None  # None: an FFN layer
    normed: int | None = None  # of post-norm blocks: the output after its norm

    @property
    def end(self) -> int:
        """The stream after the layer."""
        return self.output if self.normed is None else self.normed


@dataclasses.dataclass(eq=False)
class Stage:
    """Consecutive layers: of the body of a scan, which runs `length` times, or of the program."""

    reading: Reading
    scan: Step | None
    length: int
    blocks: list[list[Layer]]  # each begins with its attention layer


@dataclasses.dataclass(eq=False)
class Structure:
    """The Transformer in a program."""

    reading: Reading
    stages: list[Stage]
    embedded: int  # x0 in the program
    last: int  # the stream that the head reads
    tokens: int  # N
    heads: int
    readout: tuple[float, ...] | None
    grid: tuple[int, int] | None
    prefix: int | None
    tiling: Tiling | None  # of patches that a convolution cuts, which may overlap
    post_norm: bool

    @cached_property
    def rows(self) -> dict[int, Any]:
        """Where the tokens are in the values after the first stream of each program, see `tokens.rows_from`."""
        found = rows_from(self.reading, self.last, self.tokens)
        for stage in reversed(self.stages):
            attentions = {a.weights: a.query for block in stage.blocks if (a := block[0].attention) is not None}
            found |= rows_from(stage.reading, stage.blocks[0][0].stream, self.tokens, attentions)
        return found

    @property
    def depth(self) -> int:
        return sum(stage.length * len(stage.blocks) for stage in self.stages)

    def since(self, block: int) -> list[Stage]:
        """The stages from a block on. Scans keep whole iterations, so the first may also have blocks before it."""
        found = []
        for stage in self.stages:
            turns, place = divmod(max(block, 0), len(stage.blocks))
            block -= stage.length * len(stage.blocks)
            if turns >= stage.length:
                continue
            left = stage.length - turns
            if stage.scan is None or not stage.scan.params["reverse"]:
                stage = dataclasses.replace(stage, length=left, blocks=stage.blocks[place if left == 1 else 0 :])
            found.append(stage)
        return found


def find(reading: Reading, image: int) -> Structure:
    """The Transformer in a program whose explained input is the value `image`. Raises Unfit if it is missing."""
    stages = _stages(reading)
    if not stages:
        count = _softmaxes(reading)
        more = f"; {count} softmaxes are not self-attention on a residual stream" if count else ""
        raise Unfit(f"no attention was found in this function{more}")
    first, last = stages[0], stages[-1]
    shapes = [stage.reading.flat.types[stage.blocks[0][0].stream].shape for stage in stages]
    for stage, own in zip(stages, shapes, strict=True):
        _require_same(shapes[0], own, stage.blocks[0][0].sum)
    embedded = _outside(first, first.blocks[0][0].stream, "inputs")
    output = _outside(last, last.blocks[-1][-1].end, "outputs")
    post_norm = any(layer.normed is not None for block in first.blocks for layer in block)
    attention = first.blocks[0][0].attention
    assert attention is not None
    weights = first.reading.flat.types[attention.weights].shape
    tokens = weights[attention.key]
    heads = int(np.prod(weights)) // tokens**2
    readout, placed = _readout(reading, output, tokens), _grid(reading, image, embedded, tokens)
    return Structure(reading, stages, embedded, output, tokens, heads, readout, *placed, post_norm)


def _softmaxes(reading: Reading) -> int:
    return len(reading.softmaxes) + sum(map(_softmaxes, reading.bodies.values()))


def _stages(reading: Reading) -> list[Stage]:
    """The stages of a program, in order. Consecutive blocks outside of scans are one stage."""
    at = {step: place for place, step in enumerate(reading.flat.steps)}
    placed = [(at[block[0].sum], Stage(reading, None, 1, [block])) for block in _blocks(reading)]
    for step, body in reading.bodies.items():
        if blocks := _blocks(body):
            placed.append((at[step], Stage(body, step, step.params["length"], blocks)))
    found: list[Stage] = []
    for _, stage in sorted(placed, key=lambda item: item[0]):
        if found and stage.scan is None and found[-1].scan is None:
            found[-1].blocks += stage.blocks
        else:
            found.append(stage)
    return found


def _blocks(reading: Reading) -> list[list[Layer]]:
    attentions = [a for a in (_attention(reading, step) for step in reading.attentions) if a is not None]
    blocks: list[list[Layer]] = []
    shape = None
    for step in reading.sums:
        stream, branch = step.of
        inside = [
            a for a in attentions if reading.descends(branch, a.output) and not reading.descends(stream, a.output)
        ]
        out = step.outputs[0]
        if shape is None and not inside:
            continue  # before the first attention
        own = reading.flat.types[out].shape
        for attention in inside:
            _require_all(reading, attention, own)
        shape = shape or own
        if own != shape:
            last = blocks[-1][-1].output
            between = [a.outputs[0] for a in reading.attentions if reading.descends(stream, a.outputs[0])]
            if inside and not any(reading.descends(mixed, last) for mixed in between):
                _require_same(shape, own, step)
            continue  # in the head, which may read the tokens by attention
        if len(inside) > 1:
            raise Unfit("a layer with two attentions has no single map of attention")
        layer = Layer(step, stream, branch, out, inside[0] if inside else None)
        if inside:
            blocks.append([])
        blocks[-1].append(layer)
    layers = [layer for block in blocks for layer in block]
    for layer, after in zip(layers, [*(layer.stream for layer in layers[1:]), *[None] * bool(layers)], strict=True):
        found, ends = normed(reading, layer.output), reading.flat.outputs
        as_others = any(other.normed is not None for other in layers) or (found in ends and layer.output not in ends)
        if found is not None and (after == found or (after is None and as_others)):
            layer.normed = found
    return blocks


def _require_all(reading: Reading, attention: Attention, stream: Sequence[int]) -> None:
    """Raises Unfit for attention over windows of a stream [.., D]."""
    size, tokens = reading.flat.types[attention.weights].shape[attention.key], int(np.prod(stream[:-1]))
    if size != tokens:
        raise Unfit(
            f"{line_of(attention.product)}: this attention is over windows of {size} of the {tokens} tokens, and an "
            "explanation by attention needs attention over all"
        )


def _require_same(before: Sequence[int], after: Sequence[int], step: Step) -> None:
    """Raises Unfit if tokens are merged between attention layers."""
    if tuple(before) != tuple(after):
        raise Unfit(
            f"{line_of(step)}: the tokens change from {list(before)} to {list(after)} between two attentions, and an "
            "explanation by attention needs one stream of tokens"
        )


def normed(reading: Reading, value: int, branch: int | None = None) -> int | None:
    """A value after its norm, with scale and bias, in the type in which it is read.

    None if no norm follows, or none on which `branch` depends.
    """
    norms = [n.outputs[0] for n in reading.norms if n.of[2] == value]
    end = next((n for n in norms if branch is None or reading.descends(branch, n)), None)
    if end is None:
        return None
    types = reading.flat.types
    for step in reading.flat.steps:
        affine = step.kind in ("scale", "bias") or step.name == "convert_element_type"
        if affine and end in step.inputs[:2] and types[step.outputs[0]].shape == types[end].shape:
            end = step.outputs[0]
    return end


def _attention(reading: Reading, product: Step) -> Attention | None:
    """A product of weights with values as self-attention; None if queries and keys are not the same tokens."""
    weights, query = product.of, query_axis(reading, product)
    side, shape = product.inputs.index(weights), reading.flat.shape(weights)
    contracted, batched = product.params["dimension_numbers"]
    key, tokens = contracted[side][0], contracted[1 - side][0]
    if query is None or len(contracted[side]) != 1 or shape[query] != shape[key]:
        return None
    value, of_value = product.inputs[1 - side], dict(zip(batched[side], batched[1 - side], strict=True))
    groups = [a for a in range(len(shape)) if a not in (query, key, *batched[side])]
    axes = (*sorted(batched[side]), *groups, query, key)
    first = [of_value[a] for a in sorted(batched[side])]
    channels = [a for a in range(len(reading.flat.shape(value))) if a != tokens and a not in first]
    places: Any = [axis_after(product.equation, side, a) for a in axes[:-1]]
    places += [axis_after(product.equation, 1 - side, a) for a in channels]
    while (step := reading.flat.producer[weights]).name == "select_n":  # masked again
        weights = next(i for i in step.inputs[1:] if i in reading.facts)
    sizes, order = tuple(reading.flat.shape(product.outputs[0])[a] for a in places), (*first, tokens, *channels)
    return Attention(product, weights, axes, value, order, tuple(places), sizes)


def _outside(stage: Stage, value: int, ends: Literal["inputs", "outputs"]) -> int:
    """The value of the program for an input or output of a stage."""
    if stage.scan is None:
        return value
    inside = getattr(stage.reading.flat, ends)
    if value not in inside:
        raise Unfit(f"the stream of tokens does not {'enter' if ends == 'inputs' else 'leave'} its scan as a carry")
    return getattr(stage.scan, ends)[inside.index(value)]


def _readout(reading: Reading, last: int, tokens: int) -> tuple[float, ...] | None:
    """r0, from the steps after the last stream, which select and average rows."""
    result = rows_from(reading, last, tokens).get(reading.flat.outputs[0])
    if result is None:
        return None
    shares = mixture(result)
    return tuple(map(float, shares / shares.sum())) if shares.sum() else None


def _grid(
    reading: Reading, image: int, embedded: int, tokens: int
) -> tuple[tuple[int, int] | None, int | None, Tiling | None]:
    """The patch grid, the number of tokens before those of the patches, and the tiling of a convolution.

    Unknown ones are None.
    """
    flat = reading.flat
    grid = tiling = None
    shape = flat.types[image].shape
    for step in flat.steps:
        depends = reading.dependent(step)
        if not depends or not reading.descends(embedded, step.outputs[0]):
            continue
        if step.name == "conv_general_dilated":
            spec = step.params["dimension_numbers"].out_spec
            places = [flat.types[step.outputs[0]].shape[a] for a in spec[2:]]
            grid = (places[0], places[1]) if len(places) == 2 else (1, places[0]) if len(places) == 1 else None
            tiling = _tiling(flat, step) if reading.facts[depends[0]].raw else None
        elif step.name == "reshape" and grid is None and len(shape) >= 3:
            grid = _split(flat.types[step.inputs[0]].shape, flat.types[step.outputs[0]].shape)
        elif step.kind == "linear" and grid is not None:
            break
    if grid is None or (prefix := tokens - grid[0] * grid[1]) < 0:
        return None, None, None
    for step in flat.steps:
        if step.name == "concatenate" and reading.descends(embedded, step.outputs[0]):
            places = [place for place, i in enumerate(step.inputs) if i in reading.facts]
            if len(places) == 1 and places[0] < len(step.inputs) - 1:  # tokens behind those of the patches
                return grid, None, tiling
    return grid, prefix, tiling


def _tiling(flat: Flat, convolution: Step) -> Tiling | None:
    """The tiling of a convolution in two dimensions without padding."""
    params = convolution.params
    kernel = flat.shape(convolution.inputs[1])
    sides = [kernel[axis] for axis in params["dimension_numbers"].rhs_spec[2:]]
    strides = params["window_strides"]
    if len(sides) != 2 or any(low or high for low, high in params["padding"]):
        return None
    return Tiling((sides[0], sides[1]), (strides[0], strides[1]))


def _split(before: Sequence[int], after: Sequence[int]) -> tuple[int, int] | None:
    """(gh, gw), if two axes were each split in two, as for patches of an image [.., H, W, C]."""
    if len(after) - len(before) != 2:
        return None
    for place in range(len(before) - 1):
        height, width = before[place : place + 2]
        parts = after[place : place + 4]
        cut = len(parts) == 4 and parts[0] * parts[1] == height and parts[2] * parts[3] == width
        if cut and tuple(after[:place]) == tuple(before[:place]):
            return parts[0], parts[2]
    return None
