"""Calls of the library with wrong shapes, types and values: an InputError, or a result that is right."""

# Tables of cases, several to a line.
# fmt: off

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fuzz.case import BAD, BASE, CHECKPOINT, EITHER, GOOD, Case

FAST = ("tokentm", "rollout", "gae", "grad_cam", "attcat", "raw_attention", "input_gradient", "legrad", "partial_lrp",
    "lrp", "combination")


@functools.cache
def vit() -> Any:
    import tokentm_jax as tm

    return tm.load(checkpoint=CHECKPOINT)


def images(count: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 16, 24, 3), np.float32)


@functools.cache
def right(method: str, count: int = 2) -> np.ndarray:
    import tokentm_jax as tm

    return np.asarray(tm.explain(vit(), images(count), method))


def case(note: str, call: Callable[[], object], expect: str = EITHER, of: Any = None, **more: Any) -> Case:
    return Case(note, call=call, expect=expect, documented=of, **more)


def explains(note: str, make: Callable[[np.ndarray], Any], expect: str, method: str = "tokentm",
    **options: Any) -> Case:
    """`tm.explain` of changed images; where it is right, the maps are those of the images."""

    def call() -> None:
        import tokentm_jax as tm

        found = np.asarray(tm.explain(vit(), make(images()), method, **options))
        if expect == GOOD and not options:
            np.testing.assert_allclose(found, right(method), rtol=1e-4, atol=1e-6)

    return case(f"explain({method}): {note}", call, expect)


def not_hidden(note: str, make: Callable[[np.ndarray], Any], method: str) -> Case:
    """One bad image of two: refused, or NaN for that one and right for the other."""

    def call() -> None:
        import tokentm_jax as tm

        found = np.asarray(tm.explain(vit(), make(images()), method))
        assert not np.isfinite(found[0]).any(), "a map that looks fine, of an image that is none"
        np.testing.assert_allclose(found[1], right(method)[1], rtol=1e-4, atol=1e-6)

    return case(f"explain({method}): {note}", call)


def with_nan(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(batch: np.ndarray) -> np.ndarray:
        batch = batch.copy()
        batch[0, 3, 4, 1] = value
        return batch

    return change


def explain() -> Iterator[Case]:
    from tokentm_jax import explain as function

    for method in FAST:
        yield not_hidden("a NaN", with_nan(np.nan), method)
        yield not_hidden("an infinity", with_nan(np.inf), method)
        yield explains("0..255 floats", lambda b: b * 255, BAD, method)
        yield explains("float64", lambda b: b.astype(np.float64), GOOD, method)
    for note, make, expect in (
        ("uint8", lambda b: (b * 255).astype(np.uint8), BAD), ("int32", lambda b: b.astype(np.int32), BAD),
        ("bool", lambda b: b > 0.5, BAD), ("complex", lambda b: b.astype(np.complex64), BAD),
        ("a list", lambda b: b.tolist(), EITHER),
        ("a list of arrays", list, EITHER), ("a tuple", tuple, EITHER), ("an empty batch", lambda b: b[:0], EITHER),
        ("an empty list", lambda b: [], BAD), ("one image", lambda b: b[0], BAD), ("grey", lambda b: b[..., :1], BAD),
        ("RGBA", lambda b: b[..., [0, 1, 2, 0]], BAD),
        ("channels first", lambda b: b.transpose(0, 3, 1, 2), BAD), ("another size", lambda b: b[:, :8], BAD),
        ("transposed", lambda b: b.transpose(0, 2, 1, 3), BAD), ("five axes", lambda b: b[None], BAD),
        ("a number", lambda b: 1.0, BAD), ("None", lambda b: None, BAD),
        ("text", lambda b: "x", BAD), ("a path", lambda b: str(BASE / "photo.png"), BAD),
        ("objects", lambda b: b.astype(object), EITHER), ("texts", lambda b: b.astype(str), BAD),
        ("a dictionary", lambda b: {"a": b}, BAD), ("ragged", lambda b: [b[0], b[1][:3]], BAD),
        ("negative", lambda b: b - 2, BAD), ("normalised", lambda b: (b - 0.5) / 0.25, BAD),
        ("a bit above 1", lambda b: b * np.float32(1.0001), EITHER),
        ("float16", lambda b: b.astype(np.float16), EITHER), ("not contiguous", lambda b: b[:, :, ::1], GOOD),
        ("Fortran order", np.asfortranarray, GOOD),
        ("read only", lambda b: np.broadcast_to(b, b.shape), GOOD), ("big-endian", lambda b: b.astype(">f4"), EITHER),
        ("masked", np.ma.masked_array, EITHER), ("all NaN", lambda b: np.full_like(b, np.nan), EITHER),
        ("-inf", lambda b: np.full_like(b, -np.inf), EITHER), ("zeros", np.zeros_like, EITHER),
        ("a photo", lambda b: __import__("PIL.Image").Image.open(BASE / "photo.png"), BAD),
        ("a generator", lambda b: iter(b), BAD), ("a record array",
        lambda b: np.zeros((2, 16, 24), [("r", "f4"), ("g", "f4")]), BAD), ("a set", lambda b: {1.0}, BAD),
        ("bytes", lambda b: b.tobytes(), BAD),
    ):
        yield explains(note, make, expect)
    for target in (-1, 5, 99, 2**31, 2**40, -(2**63), 10**30, 1.0, 1.5, float("nan"), "ant", "1", True, [0], [0, 1, 2],
            [0, 5], [[0, 1]], [0.0, 1.0], [], None, {}, np.array([0, 9]), np.zeros((2, 5)), np.array(["a", "b"]),
            [True, False], [None, None], [0, -1], b"x", object, np.uint64(2**63), [[0], [1]]):
        expect = GOOD if target is None else BAD
        yield case(f"explain: target {str(target)[:30]!a}", lambda t=target: function(vit(), images(), target=t),
            expect, function)
    for target in (0, np.int64(1), np.int8(2), np.uint8(2), [0, 1], (0, 1), np.array([0, 1], np.uint8), np.array(3),
            np.array([4, 4], np.int64)):
        def call(target: Any = target) -> None:
            wanted = np.broadcast_to(np.asarray(target), 2).tolist()
            one = [np.asarray(function(vit(), images()[i : i + 1], target=int(wanted[i])))[0] for i in range(2)]
            np.testing.assert_allclose(np.asarray(function(vit(), images(), target=target)), one, rtol=1e-3, atol=1e-6)
        yield case(f"explain: target {target!r}", call, GOOD)
    for method in (None, 1, "", "TokenTM", "tokentm ", ["tokentm"], {}, "x" * 10**6, b"tokentm", "\0", object):
        yield case(f"explain: method {str(method)[:20]!a}", lambda m=method: function(vit(), images(), m), BAD)
    for name, values in (
        ("first_block", (-1, 1, 2, 99, 0.0, True, "x", None, 10**30, [0], np.float32(0))),
        ("end_block", (-1, 0, 2, 1.0, True, "x", 10**30, [1])), ("ffn", (0, 1, None, "yes", [], 1.0)),
        ("length", (2, "x")), ("direction", ("x", 1, None, "", [])), ("original", ("x", None, 3, [])),
        ("attention", ("x", 1, True)), ("initialise", (1, "x", None)), ("nothing", (1,)), ("options", (1, None)),
    ):
        for value in values:
            yield case(f"explain: {name}={value!r}", lambda n=name, v=value: function(vit(), images(), **{n: v}), BAD
                if value not in (None,) else EITHER)
    for name, value in (("first_block", np.int64(0)), ("end_block", np.int64(1)), ("ffn", np.bool_(True)),
            ("first_block", np.uint8(0))):
        yield case(f"explain: {name}={value!r}", lambda n=name, v=value: function(vit(), images(), **{n: v}), GOOD)
    for name in ("samples", "steps", "sigma", "noise"):
        for value in (0, -1, 1.5, "x", float("nan"), 10**9, True):
            for method in ("smooth_grad", "integrated_gradients"):
                yield case(f"explain({method}): {name}={value!r}", lambda m=method, n=name,
                    v=value: function(vit(), images(1), m, **{n: v}), EITHER)


def pure() -> Iterator[Case]:
    """`explain_fn` and `capture`: nothing can be raised under `jit`."""

    def out_of_range(method: str, target: int, compiled: bool) -> None:
        import jax
        import jax.numpy as jnp

        import tokentm_jax as tm

        function = tm.explain_fn(vit().module, method)
        inputs = vit().preprocessing.normalise(jnp.asarray(images()))
        targets = jnp.array([target, 1], jnp.int32)
        found = np.asarray((jax.jit(function) if compiled else function)(vit().params, inputs, targets))
        alone = np.asarray(function(vit().params, inputs[1:], targets[1:]))
        assert np.isnan(found[0]).all(), "a map that looks fine, of a class that the model does not have"
        np.testing.assert_allclose(found[1:], alone, rtol=1e-3, atol=1e-6)

    for method, target in itertools.product(("tokentm", "gae", "grad_cam", "attcat", "lrp", "input_gradient"),
            (-1, 5, 2**31 - 1)):
        yield case(f"explain_fn({method}) of class {target}, jit", lambda m=method, t=target: out_of_range(m, t, True))

    def nan_in(method: str) -> None:
        import jax.numpy as jnp

        import tokentm_jax as tm

        inputs = vit().preprocessing.normalise(jnp.asarray(with_nan(np.nan)(images())))
        found = np.asarray(tm.explain_fn(vit().module, method)(vit().params, inputs))
        assert np.isnan(found[0]).all() and np.isfinite(found[1]).all(), found

    for method in FAST:
        yield case(f"explain_fn({method}) of a NaN", lambda m=method: nan_in(m), GOOD)

    def captured(change: Callable[[np.ndarray], Any], target: Any = None) -> Callable[[], object]:
        import tokentm_jax as tm

        return lambda: tm.capture(vit().module, vit().params, change(images()), target)

    for note, change in (("numpy", lambda b: b), ("a list", lambda b: b.tolist()), ("one image", lambda b: b[0]),
            ("another size", lambda b: b[:, :8]), ("integers", lambda b: b.astype(np.int32)), ("None", lambda b: None),
            ("an empty batch", lambda b: b[:0]), ("text", lambda b: "x")):
        yield case(f"capture: {note}", captured(change), GOOD if note == "numpy" else EITHER)
    for params in ({}, None, [], {"params": {}}, 1):
        def bad_params(params: Any = params) -> object:
            import tokentm_jax as tm

            return tm.capture(vit().module, params, images())
        yield case(f"capture: parameters {params!r}", bad_params, EITHER)


def maps() -> Iterator[Case]:
    import tokentm_jax as tm

    token = np.random.default_rng(0).random((2, 2, 3)).astype(np.float32)

    def nan_pixels() -> None:
        changed = token.copy()
        changed[0, 0, 0] = np.nan
        found = np.asarray(tm.to_pixels(changed, (16, 24)))
        assert np.isnan(found[0]).all() and np.isfinite(found[1]).all(), "NaN became a map that looks fine"

    yield case("to_pixels of NaN", nan_pixels)
    yield case("combine of NaN", lambda: nan_combined(token))
    for note, value in (("numpy", token), ("float64", token.astype(np.float64)), ("float16", token.astype(np.float16)),
            ("big", token * 1e38), ("tiny", token * 1e-38), ("constant", token * 0)):
        yield case(f"to_pixels of {note}", lambda v=value: in_unit(tm.to_pixels(v, (16, 24))), EITHER if "64" in note
            else GOOD)
    for note, value in (("a list", token.tolist()), ("one map", token[0]), ("None", None),
            ("integers", (token * 9).astype(int)), ("empty", token[:0]), ("no pixels", token[:, :0]), ("texts", "x"),
            ("bool", token > 0.5), ("complex", token * 1j), ("infinity", token * np.inf)):
        yield case(f"to_pixels of {note}", lambda v=value: tm.to_pixels(v, (16, 24)), EITHER, tm.to_pixels)
    for size in ((0, 0), (-1, 5), (16,), 16, (16, 24, 3), (1.5, 2), None, "ab", (10**9, 10**9), (16, True), ("a", "b"),
            (np.int64(16), np.int64(24)), [16, 24], (2**40, 1)):
        yield case(f"to_pixels to {size!r}", lambda s=size: tm.to_pixels(token, s), EITHER, tm.to_pixels)
    for what in ([], None, [token, token[:1]], [token, token[0]], token, "x", [None], [token, 1], [token.tolist()],
            [token, token[:, :1]], [token[:0]], ()):
        yield case(f"combine of {str(what)[:30]!a}", lambda w=what: tm.combine(w), EITHER, tm.combine)
    for how in ("sum", "", None, 1, ["mean"]):
        yield case(f"combine by {how!r}", lambda h=how: tm.combine([token, token], h), BAD)


def nan_combined(token: np.ndarray) -> None:
    import tokentm_jax as tm

    changed = token.copy()
    changed[0, 0, 0] = np.nan
    assert np.isnan(np.asarray(tm.combine([changed, token]))[0]).all(), "NaN became a map that looks fine"


def in_unit(found: Any) -> None:
    found = np.asarray(found)
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1, found


def loading() -> Iterator[Case]:
    import tokentm_jax as tm

    for model in ("", 1, [], {}, None, "x" * 10**5, {"depth": "x"}, {"img_size": 16}, {1: 2}, {"depth": 10**9}, b"x",
            ["deit_tiny_patch16_224"], {"img_size": float("nan")}, object, True, "\0"):
        yield case(f"load({str(model)[:30]!a})", lambda m=model: tm.load(m, CHECKPOINT), GOOD if model is None
            else BAD, tm.load)
    for path in (1, "", [], None, b"x", "\0", "x" * 5000, {}, 1.5, object, True, -1, "/dev/zero", "/proc/self/mem"):
        yield case(f"load(None, {str(path)[:30]!a})", lambda p=path: tm.load(None, p), GOOD if path is None else BAD,
            tm.load)
    for size in (0, -1, 17, 1.5, "x", (16,), (16, 24, 3), True, 10**9, (8, "x"), [], float("nan"), None, (24, 16),
            [16, 16], np.int64(16)):
        yield case(f"load(img_size={size!r})", lambda s=size: tm.load(None, CHECKPOINT, img_size=s), EITHER, tm.load)
    for count in (0, 4, 6, -1, 1.5, "5", True, 10**9, [], np.int64(5)):
        yield case(f"load(num_classes={count!r})", lambda c=count: tm.load(None, CHECKPOINT, num_classes=c), EITHER
            if "int64" in repr(count) else BAD, tm.load)
    for names in ([], ["a"], 1, "nowhere", [1, 2, 3, 4, 5], ["a"] * 5, {"a": 1}, True, [None] * 5, b"x",
            np.array(["a"] * 5), ("a", "b", "c", "d", "e"), {"0": "a"}):
        yield case(f"load(class_names={names!r:.40})", lambda n=names: tm.load(None, CHECKPOINT, class_names=n),
            EITHER, tm.load)
    for dtype in ("int32", "x", 1, [], "float64", "bfloat16", "float16", np.float32, object, "complex64", True,
            b"f4", {}):
        yield case(f"load(dtype={dtype!r})", lambda d=dtype: tm.load(None, CHECKPOINT, dtype=d), EITHER, tm.load)
    for paths in ([], "", [""], ["nowhere"], None, 1, [None], "\0", [1], "x" * 5000, [BASE / "photo.png"] * 3, BASE,
            {}, b"x", [b"x"]):
        yield case(f"read({str(paths)[:30]!a})", lambda p=paths: vit().read(p), EITHER, tm.Model.read)
    for index in (-1, 5, "5", "ant", "", None, 1.0, [], "x", 10**30, "9" * 5000, "٣", "1_0",
            "00000000000000000000000000000000005", True, "\0", "-0", "+1", np.int64(2), b"ant", "1e0"):
        right_one = index == "ant" or isinstance(index, np.int64)
        yield case(f"class_index({str(index)[:20]!a})", lambda i=index: vit().class_index(i), GOOD if right_one
            else EITHER if index in ("-0", "٣") else BAD)
    for fields in ({"size": 1}, {"size": (0, 1)}, {"size": (16, "x")}, {"size": (True, 1)}, {"crop_pct": 0},
            {"crop_pct": float("nan")}, {"crop_pct": "1"}, {"crop_pct": True}, {"interpolation": "x"},
            {"interpolation": None}, {"interpolation": []}, {"mean": 0.5}, {"mean": (0, 0)}, {"std": (0, 1, 1)},
                   {"std": (float("inf"),) * 3}, {"mean": ("a", "b", "c")}, {"std": None}, {"size": (10**9, 10**9)},
                   {"size": [16, 24]}, {"mean": np.zeros(3)}, {"std": [1, 1, 1]}):
        wrong = not isinstance(fields.get("size", fields.get("std", fields.get("mean"))), list | np.ndarray)
        def made(fields: Any = fields) -> object:
            return tm.inputs.Preprocessing(**{"size": (16, 24), "mean": (0.5,) * 3, "std": (0.5,) * 3, **fields})
        yield case(f"Preprocessing({fields!r:.40})", made, BAD if wrong else EITHER)
    for config in (None, 1, "", "x", [], {}, {"depth": 0}, {"depth": True}, {"img_size": (1, 2, 3)}, {"nothing": 1},
            {"embed_dim": 10**12}, {"num_heads": 7}, {"patch_size": 5, "img_size": 16}, {"mlp_ratio": float("nan")},
            {"mlp_ratio": 1e308}, {"activation": []}, {"global_pool": None}, {"in_chans": 0},
                   {"norm_eps": "x"}, {"class_token": 1}, {"depth": np.int64(1)}, {1: 1}, {"img_size": float("inf")},
                   {"reg_tokens": -1}, {"init_values": -1}, {"num_classes": 10**30}):
        yield case(f"build({config!r:.40})", lambda c=config: tm.models.build(c), EITHER if config == {}
            or "int64" in repr(config) else BAD)
    yield from writing()


def writing() -> Iterator[Case]:
    import tokentm_jax as tm

    def write(path: Any = "w.safetensors", params: Any = None, names: Any = None, extra: Any = None) -> object:
        made = vit().params if params is None else params(vit().params)
        return tm.models.write_checkpoint(path, vit().module, made, vit().preprocessing, names, extra)

    for path in ("w.bin", "", 1, None, "\0", "x" * 300 + ".safetensors", "/proc/x.safetensors",
            "canary.txt/x.safetensors", "a/b.safetensors", "canary.txt", b"x", ".", "..", "/"):
        yield case(f"write_checkpoint({str(path)[:20]!a})", lambda p=path: write(p), EITHER,
            tm.models.write_checkpoint)
    for note, params in (("nothing", lambda p: {}), ("None inside", lambda p: {**p, "head": None}),
            ("NaN", lambda p: {**p, "cls_token": p["cls_token"] * np.nan}),
            ("texts", lambda p: {**p, "cls_token": "x"}), ("missing",
            lambda p: {k: v for k, v in p.items() if k != "head"}),
                         ("another shape", lambda p: {**p, "cls_token": p["cls_token"][..., :3]}),
                         ("integers", lambda p: {**p, "cls_token": p["cls_token"].astype(int)}),
                         ("a list", lambda p: list(p)), ("too much", lambda p: {**p, "more": np.zeros(3)}),
                         ("complex", lambda p: {**p, "cls_token": p["cls_token"] * 1j})):
        yield case(f"write_checkpoint of {note}", lambda q=params: write(params=q), EITHER if note in ("integers",)
            else BAD)
    for names in (["a"], [1] * 5, "abcde", [None] * 5, {"a": 1}, 1, ["\ud800"] * 5, [[]] * 5):
        yield case(f"write_checkpoint with the names {names!r:.30}", lambda n=names: write(names=n), EITHER
            if names in ("abcde", ["\ud800"] * 5) else BAD)
    for extra in ({"a": object}, {"a": float("nan")}, {1: 2}, [], "x", {"architecture": 1}, {"a": np.float32(1)},
            {"a": {1, 2}}):
        yield case(f"write_checkpoint with {extra!r:.30}", lambda e=extra: write(extra=e), EITHER)


def cases(rng: random.Random) -> Iterator[Case]:
    groups = [list(group) for group in (explain(), pure(), maps(), loading())]
    for group in groups:
        yield from group
