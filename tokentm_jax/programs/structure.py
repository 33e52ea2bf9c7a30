"""The Transformer in a program: its layers, what its head reads, and where its patches are.

layer       a residual sum on the stream: an attention layer if its branch has an attention that its stream has not
stage       layers in a row: those of a scan's body, or those between scans
read-out    how the head mixes the tokens of the last stream
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from tokentm_jax.errors import Unfit
from tokentm_jax.maths.maps import Tiling
from tokentm_jax.programs.flat import Flat, Step
from tokentm_jax.programs.reading import ELEMENTWISE, SHAPE, Reading


@dataclasses.dataclass(eq=False)
class Attention:
    """The product of attention weights with values."""

    product: Step
    weights: int  # the value [.., N, .., N] that is contracted with the values
    query: int  # its axes
    key: int

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
    normed: int | None = None  # of post-norm blocks: the output behind its norm

    @property
    def end(self) -> int:
        """The stream behind the layer."""
        return self.output if self.normed is None else self.normed


@dataclasses.dataclass(eq=False)
class Stage:
    """Layers in a row: of the body of a scan, which runs `length` times, or of the program itself."""

    reading: Reading
    scan: Step | None
    length: int
    blocks: list[list[Layer]]  # each begins with its attention layer


@dataclasses.dataclass(eq=False)
class Structure:
    """What was found."""

    reading: Reading
    stages: list[Stage]
    embedded: int  # x0 in the program
    last: int  # the stream that the head reads
    tokens: int  # N
    width: int  # D
    heads: int
    readout: tuple[float, ...] | None
    grid: tuple[int, int] | None
    prefix: int | None
    tiling: Tiling | None  # of patches that a convolution cuts, which may overlap
    post_norm: bool

    @property
    def depth(self) -> int:
        return sum(stage.length * len(stage.blocks) for stage in self.stages)


def find(reading: Reading, image: int) -> Structure:
    """The Transformer in a program whose explained input is the value `image`. Raises Unfit where there is none."""
    stages = _stages(reading)
    if not stages:
        seen = _all(reading, lambda r: len(r.softmaxes))
        more = f"; {seen} softmaxes are no self-attention on a residual stream" if seen else ""
        raise Unfit(f"no attention was found in this function{more}")
    first, last = stages[0], stages[-1]
    layer = first.blocks[0][0]
    embedded = layer.stream if first.scan is None else _outside(first, layer.stream)
    end = last.blocks[-1][-1]
    post_norm = any(layer.normed is not None for block in first.blocks for layer in block)
    output = end.end if last.scan is None else _carried_out(last, end.end)
    shape = reading.flat.types[embedded].shape
    attention = first.blocks[0][0].attention
    assert attention is not None
    weights = first.reading.flat.types[attention.weights].shape
    tokens = weights[attention.key]
    grid, prefix, tiling = _grid(reading, image, embedded, tokens)
    structure = Structure(
        reading,
        stages,
        embedded,
        output,
        tokens,
        shape[-1],
        int(np.prod(weights)) // tokens**2,
        None,
        grid,
        prefix,
        tiling,
        post_norm,
    )
    structure.readout = _readout(structure)
    return structure


def _all(reading: Reading, count: Any) -> int:
    return count(reading) + sum(_all(body, count) for body in reading.bodies.values())


def _stages(reading: Reading) -> list[Stage]:
    """The stages of a program, in order: blocks of its own that follow one another are one stage."""
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
        shape = shape or reading.flat.types[out].shape
        if reading.flat.types[out].shape != shape:
            continue  # of the head
        if len(inside) > 1:
            raise Unfit("a layer with two attentions has no single map of attention")
        layer = Layer(step, stream, branch, out, inside[0] if inside else None)
        if inside:
            blocks.append([])
        blocks[-1].append(layer)
    layers = [layer for block in blocks for layer in block]
    for layer, after in zip(layers, [*(layer.stream for layer in layers[1:]), *[None] * bool(layers)], strict=True):
        normed = _normed(reading, layer.output)
        if normed is not None and (after == normed or (after is None and any(l.normed is not None for l in layers))):
            layer.normed = normed
        if (
            after is None
            and normed is not None
            and normed in reading.flat.outputs
            and layer.output not in reading.flat.outputs
        ):
            layer.normed = normed
    return blocks


def _normed(reading: Reading, value: int) -> int | None:
    """What a norm makes of a sum, with its scale and bias; None where no norm follows."""
    norm = next((n for n in reading.norms if n.of[2] == value), None)
    if norm is None:
        return None
    end = norm.outputs[0]
    for step in reading.flat.steps:
        affine = step.kind in ("scale", "bias") or step.name == "convert_element_type"
        types = reading.flat.types
        if affine and end in step.inputs[:2] and types[step.outputs[0]].shape == types[end].shape:
            end = step.outputs[0]
    return end


def _attention(reading: Reading, product: Step) -> Attention | None:
    """A product of weights with values as self-attention; None where queries and keys are not the same tokens."""
    weights = product.of
    side = product.inputs.index(weights)
    contracted, batched = product.params["dimension_numbers"]
    shape = reading.flat.types[weights].shape
    keys = [axis for axis in contracted[side] if shape[axis] > 1]
    if len(keys) != 1:
        return None
    free = [a for a in range(len(shape)) if a not in contracted[side] and a not in batched[side]]
    queries = [a for a in free if shape[a] == shape[keys[0]]]
    return Attention(product, weights, queries[-1], keys[0]) if queries else None


def _outside(stage: Stage, value: int) -> int:
    """The value that enters a scan as an input of its body."""
    assert stage.scan is not None
    inputs = stage.reading.flat.inputs
    if value not in inputs:
        raise Unfit("the stream of tokens does not enter its scan as a carry")
    return stage.scan.inputs[inputs.index(value)]


def _carried_out(stage: Stage, value: int) -> int:
    assert stage.scan is not None
    outputs = stage.reading.flat.outputs
    if value not in outputs:
        raise Unfit("the stream of tokens does not leave its scan as a carry")
    return stage.scan.outputs[outputs.index(value)]


# ---- tokens through shapes ------------------------------------------------------------------------------------------

Rows = tuple[int, np.ndarray] | np.ndarray  # (axis, share of each token [length, N]), or the shares [N] of a mixture


def _axis_through(step: Step, axis: int, before: Sequence[int], after: Sequence[int]) -> int | None:
    """Where an axis is after a change of shape; None where it is merged or split."""
    if step.name == "transpose":
        return list(step.params["permutation"]).index(axis)
    if step.name == "broadcast_in_dim":
        return step.params["broadcast_dimensions"][axis]
    if step.name == "squeeze":
        gone = [d % len(before) for d in step.params["dimensions"]]
        return None if axis in gone else axis - sum(d < axis for d in gone)
    ahead = int(np.prod(before[:axis], dtype=int))
    for place, size in enumerate(after):
        if int(np.prod(after[:place], dtype=int)) == ahead and size == before[axis] and size > 1:
            return place
    return axis if tuple(before) == tuple(after) else None


def rows_from(reading: Reading, start: int, n: int, stage: Stage | None = None) -> dict[int, Any]:
    """Where the tokens of the value `start` [.., N, D] are in the values behind it: `Rows` by number.

    Values of which it cannot be told are left out. In attention the tokens are the queries.
    """
    flat = reading.flat
    axes = [a for a, size in enumerate(flat.types[start].shape[:-1]) if size == n]
    if len(axes) != 1:
        return {}
    known: dict[int, Any] = {start: (axes[0], np.eye(n))}
    queries = {}
    for block in stage.blocks if stage is not None else ():
        attention = block[0].attention
        if attention is not None:
            queries[attention.weights] = (attention.query, np.eye(n))
    for step in flat.steps:
        given = [(i, known[i]) for i in step.inputs if not isinstance(i, Literal) and i in known]
        for out in step.outputs:
            rows = queries.get(out, _rows_after(flat, step, given, out, queries) if given else None)
            if rows is not None:
                known[out] = rows
    return known


def _readout(structure: Structure) -> tuple[float, ...] | None:
    """r0, from the steps behind the last stream: which rows are taken, and what is averaged."""
    flat = structure.reading.flat
    known = rows_from(structure.reading, structure.last, structure.tokens)
    result = known.get(flat.outputs[0]) if not isinstance(flat.outputs[0], Literal) else None
    if result is None:
        return None
    shares = _mixture(result)
    return tuple(map(float, shares / shares.sum())) if shares.sum() else None


def _mixture(rows: Any) -> np.ndarray:
    return rows[1].mean(0) if isinstance(rows, tuple) else rows


def _rows_after(flat: Flat, step: Step, given: list[tuple[int, Any]], out: int, queries: Any = ()) -> Any:
    """What one step makes of rows; None where it cannot be told."""
    number, rows = given[0]
    before, after = flat.types[number].shape, flat.types[out].shape
    if len(given) > 1:
        with_axis = [r for _, r in given if isinstance(r, tuple)]
        of_query = [(i, r) for i, r in given if i in queries]
        if of_query and step.name == "dot_general":
            return _rows_after(flat, step, of_query, out)
        if step.name in ("dot_general",) and with_axis:  # attention pooling: the shares depend on the image
            return _mixture(with_axis[0])
        if (
            step.name == "concatenate"
            and with_axis
            and len(with_axis) == len(given)
            and step.params["dimension"] == with_axis[0][0]
        ):
            return (with_axis[0][0], np.concatenate([r[1] for r in with_axis]))
        if with_axis:
            return with_axis[0]
        distinct = [r for _, r in given]
        return sum(distinct) / len(distinct)
    if not isinstance(rows, tuple):
        return rows
    axis, shares = rows
    if step.name in SHAPE:
        if step.name in ("reshape", "transpose", "broadcast_in_dim", "squeeze"):
            place = _axis_through(step, axis, before, after)
            if place is None:
                if before[axis] == 1 or shares.shape[0] == 1:
                    return shares.mean(0)
                merged = [s for s in after if s % before[axis] == 0 and s >= before[axis]]
                return (list(after).index(merged[0]), shares) if merged else None
            return (place, shares)
        return rows
    if step.name == "slice":
        start, stop = step.params["start_indices"][axis], step.params["limit_indices"][axis]
        stride = (step.params["strides"] or [1] * len(before))[axis]
        return (axis, shares[start:stop:stride])
    if step.name in ("gather", "dynamic_slice") and before[axis] != (after[axis] if axis < len(after) else None):
        indices = step.inputs[1 + axis] if step.name == "dynamic_slice" else step.inputs[1]
        index = (
            int(np.ravel(indices.val)[0]) if isinstance(indices, Literal) else 0 if _is_zero(flat, indices) else None
        )
        return None if index is None else shares[index]
    if step.name in ("reduce_sum", "reduce_max", "argmax"):
        gone = step.params["axes"]
        if axis in gone:
            return shares.mean(0)
        return (axis - sum(int(a) < axis for a in gone), shares)
    if step.name == "dot_general":
        side = 0 if step.inputs[0] == number else 1
        contracted, batched = step.params["dimension_numbers"]
        if axis in contracted[side]:
            return shares.mean(0)
        if axis in batched[side]:
            return (list(batched[side]).index(axis), shares)
        free = [a for a in range(len(before)) if a not in contracted[side] and a not in batched[side]]
        other = flat.types[step.inputs[1 - side]].shape
        ahead = len(batched[side]) + (0 if side == 0 else len(other) - len(contracted[1 - side]) - len(batched[side]))
        return (ahead + free.index(axis), shares)
    if step.name in ELEMENTWISE or before == after:
        return rows
    return shares.mean(0) if step.name not in ("scan",) else None


def _is_zero(flat: Flat, value: Any) -> bool:
    constant = flat.constants.get(value)
    return constant is not None and not np.any(np.asarray(constant))


def _grid(
    reading: Reading, image: int, embedded: int, tokens: int
) -> tuple[tuple[int, int] | None, int | None, Tiling | None]:
    """The patch grid, the number of tokens before those of the patches, and how a convolution cuts them; None where it
    cannot be told."""
    flat = reading.flat
    grid = tiling = None
    shape = flat.types[image].shape
    for step in flat.steps:
        depends = [i for i in step.inputs if not isinstance(i, Literal) and i in reading.facts]
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
    if grid is None:
        return None, None, None
    prefix = tokens - grid[0] * grid[1]
    if prefix < 0:
        return None, None, None
    behind = 0
    for step in flat.steps:
        if step.name == "concatenate" and reading.descends(embedded, step.outputs[0]):
            places = [
                place for place, i in enumerate(step.inputs) if not isinstance(i, Literal) and i in reading.facts
            ]
            if len(places) == 1:
                axis = step.params["dimension"]
                behind += sum(flat.types[i].shape[axis] for i in step.inputs[places[0] + 1 :])
    return grid, None if behind else prefix, tiling


def _tiling(flat: Flat, convolution: Step) -> Tiling | None:
    """How a convolution in two dimensions cuts its input, where it pads nothing."""
    params = convolution.params
    kernel = flat.shape(convolution.inputs[1])
    sides = [kernel[axis] for axis in params["dimension_numbers"].rhs_spec[2:]]
    strides = params["window_strides"]
    if len(sides) != 2 or any(low or high for low, high in params["padding"]):
        return None
    return Tiling((sides[0], sides[1]), (strides[0], strides[1]))


def _split(before: Sequence[int], after: Sequence[int]) -> tuple[int, int] | None:
    """(gh, gw) where two axes were split in two, as of patches of an image [.., H, W, C]."""
    if len(after) - len(before) != 2:
        return None
    for place in range(len(before) - 1):
        height, width = before[place : place + 2]
        parts = after[place : place + 4]
        cut = len(parts) == 4 and parts[0] * parts[1] == height and parts[2] * parts[3] == width
        if cut and tuple(after[:place]) == tuple(before[:place]):
            return parts[0], parts[2]
    return None
