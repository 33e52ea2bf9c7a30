"""Recipes: Python files whose `config` is an EvaluateConfig or a TrainConfig."""

# Tables of cases, several to a line.
# fmt: off

import random
from collections.abc import Iterator
from typing import Any

from fuzz.base import OPTIONS
from fuzz.case import BAD, CHECKPOINT, EITHER, GOOD, Case, base, fifo, folder, link, sparse

WRONG = (
    "None", "True", "-1", "0", "1.5", "10**30", "float('nan')", "float('inf')", "-1e-9", "'x'", "''", "[]", "{}", "()",
    "object()", "lambda: 1", "b'x'", "'../../x'", "'/tmp/x'", "'a\\0b'", "'x' * 500", "1j",
    "set()", "[[]] * 3", "np.int64(3)", "np.float32(0.5)", "np.zeros(3)", "range(3)", "int", "'tokentm'", "iter([])",
    "type('Liar', (str,), {'__eq__': lambda *a: 1 / 0, '__hash__': str.__hash__})('x')",
    "type('Raises', (), {'__repr__': lambda s: 1 / 0})()", "'\\x1b[31m'", "'\\ud800'",
)
EVALUATE = {
    "name": "'t'", "task": "'saco'", "data": "'data'", "rows": "[Row('rollout', 'rollout')]", "model": "None",
    "checkpoint": repr(CHECKPOINT), "profile": "'default'", "options": "{}", "paper": "{}", "batch_size": "2",
    "limit": "None", "seed": "0",
}
ROW = {"name": "'r'", "method": "'rollout'", "options": "{}", "random_blocks": "None", "by_patch": "False"}
TRAIN = {"name": "'t'", "train_data": "'data'", "test_data": "'data'", "model": repr(OPTIONS), "epochs": "1",
    "warmup_epochs": "0.5", "batch_size": "5"}
MORE = ("learning_rate", "weight_decay", "beta_2", "clip_norm", "label_smoothing", "ema_decay", "crop_padding", "flip",
    "affine_colour", "crop_area", "rand_augment", "cutmix", "mixup", "teacher", "teacher_weight", "temperature",
    "teacher_views", "patch_drop", "patch_drop_epochs", "optimiser", "mixed_precision", "mimetic_init", "fine_tune",
    "mean", "std", "seed", "checkpoint_epochs")
# Values that a field takes as they are.
FINE = {
    ("name", "'x'"), ("name", "'tokentm'"), ("data", "'x'"), ("limit", "None"), ("rows", "[]"), ("model", "None"),
    ("model", "'tokentm'"), ("checkpoint", "None"), ("seed", "0"), ("batch_size", "np.int64(3)"),
    ("seed", "np.int64(3)"), ("limit", "np.int64(3)"), ("options", "{}"), ("paper", "{}"),
    ("random_blocks", "None"), ("random_blocks", "0"), ("by_patch", "True"), ("method", "'tokentm'"), ("flip", "True"),
    ("mimetic_init", "True"), ("mixed_precision", "True"), ("fine_tune", "None"),
}


def recipe(note: str, command: str, content: Any, expect: str = BAD, name: str = "r.py", **more: Any) -> Case:
    files = {name: content, "data": base("data"), **more.pop("files", {})}
    names = more.pop("names", name if expect == BAD else "")
    return Case(f"{command}: {note}", (command, name, *more.pop("after", ("--out", "o"))), files=files, expect=expect,
        names=names, **more)


def text(kind: str, fields: dict[str, str]) -> str:
    inside = ", ".join(f"{name}={value}" for name, value in fields.items())
    imports = "from models.training.recipe import TrainConfig\nfrom tokentm_jax import EvaluateConfig, Row\n"
    return f"import numpy as np\n{imports}config = {kind}({inside})\n"


def fields() -> Iterator[Case]:
    """Every field with every wrong value."""
    for field in EVALUATE:
        for value in WRONG:
            content = text("EvaluateConfig", {**EVALUATE, field: value})
            yield recipe(f"{field} = {value[:40]}", "evaluate", content, EITHER)
    for field in ROW:
        for value in WRONG:
            inside = ", ".join(f"{k}={v}" for k, v in {**ROW, field: value}.items())
            yield recipe(f"Row.{field} = {value[:40]}", "evaluate",
                text("EvaluateConfig", {**EVALUATE, "rows": f"[Row({inside})]"}), EITHER)
    for field in (*TRAIN, *MORE):
        for value in WRONG:
            yield recipe(f"{field} = {value[:40]}", "train", text("TrainConfig", {**TRAIN, field: value}), EITHER)


def surely_wrong() -> Iterator[Case]:
    """Values that no reading makes sense of: they must be refused."""
    for field, values in (
        ("seed", ("True", "1.5", "'x'", "-1", "10**30", "None")), ("batch_size",
        ("True", "1.5", "'2'", "0", "-1", "None", "10**30")), ("limit", ("True", "0", "1.5", "'3'")),
        ("rows", ("[]", "()", "'tokentm'", "None", "[1]", "[('a', 'b')]")),
        ("task", ("None", "'perturb'", "1", "[]")), ("profile", ("None", "1", "'x'")),
        ("options", ("[]", "{'fill': 'blur'}", "{'groups': 0}", "{'groups': 1}", "{'groups': 1.5}",
        "{'groups': 10**6}", "{'groups': True}", "{1: 2}", "None")),
        ("paper", ("[]", "{'a': 1}", "{('a', 'b'): 'x'}", "{('a', 'b', 'c'): 1}", "None")),
        ("name", ("''", "1", "None", "'../../x'", "'/tmp/x'", "'a/b'", "'.'", "'..'", "'a\\0b'")),
        ("model", ("1", "[]", "'nope'")), ("checkpoint", ("1", "[]", "''")),
    ):
        for value in values:
            after = () if field == "name" else ("--out", "o")
            yield recipe(f"{field} = {value}, which is wrong", "evaluate",
                text("EvaluateConfig", {**EVALUATE, field: value}), after=after, names="")
    for field, values in (
        ("name", ("''", "1", "None")), ("method", ("1", "None", "'x'", "''")),
        ("options", ("[]", "None", "{'x': 1}", "{'first_block': 0.5}", "{'first_block': True}",
        "{'first_block': -1}")),
        ("random_blocks", ("0.5", "True", "-1", "2", "'x'")), ("by_patch", ("1", "'x'", "None")),
    ):
        for value in values:
            inside = ", ".join(f"{k}={v}" for k, v in {**ROW, field: value}.items())
            yield recipe(f"Row.{field} = {value}, which is wrong", "evaluate",
                text("EvaluateConfig", {**EVALUATE, "rows": f"[Row({inside})]"}), names="")
    for value in ("True", "1.5", "-1", "2", "'x'", "0"):
        inside = f"Row('r', 'tokentm', {{'end_block': {value}}})"
        yield recipe(f"end_block = {value}, which is wrong", "evaluate",
            text("EvaluateConfig", {**EVALUATE, "rows": f"[{inside}]"}), names="")
    for field, values in (
        ("name", ("''", "1", "None", "'../../x'", "'/tmp/x'", "'a/b'")),
        ("epochs", ("0", "-1", "True", "'1'", "float('nan')", "float('inf')", "None")),
        ("batch_size", ("0", "-1", "1.5", "True", "1000")), ("model", ("1", "{}", "None", "[]", "'x'")),
        ("learning_rate", ("-1", "float('nan')", "float('inf')", "'x'", "True")),
        ("ema_decay", ("2", "-1", "float('nan')")), ("cutmix", ("2", "-1", "float('nan')")),
        ("patch_drop", ("1", "2", "-1", "float('nan')")), ("mean", ("()", "(1, 2)", "None", "0.5", "('a', 'b', 'c')")),
        ("std", ("(0, 0, 0)", "(1, 1)", "(-1, 1, 1)", "(float('nan'),) * 3")),
        ("fine_tune", ("('a',)", "'x'", "(1, 2)", "('nope', 'nope')")),
        ("checkpoint_epochs", ("0", "-1", "float('nan')")), ("crop_padding", ("-1", "1.5", "10**9")),
        ("seed", ("-1", "1.5", "10**30")),
        ("label_smoothing", ("2", "-1", "float('nan')")), ("warmup_epochs", ("-1", "float('nan')")),
        ("flip", ("1", "None")), ("beta_2", ("2", "-1")), ("clip_norm", ("-1", "float('nan')")),
        ("weight_decay", ("-1", "float('inf')")), ("affine_colour", ("-1", "2", "'x'")),
        ("crop_area", ("(0, 1)", "(0.5,)", "(0.9, 0.1)", "1")), ("rand_augment", ("(0, 5)", "(2, 11)", "(2,)", "5")),
        ("mixup", ("2", "-1", "float('nan')")), ("teacher", ("('a',)", "'x'", "('nope', None)", "(None, 'nope')")),
        ("teacher_weight", ("2", "-1")), ("temperature", ("0", "-1")), ("teacher_views", ("-1", "1.5", "3")),
    ):
        for value in values:
            after = () if field == "name" else ("--out", "o")
            yield recipe(f"{field} = {value}, which is wrong", "train", text("TrainConfig", {**TRAIN, field: value}),
                after=after, names="")


def programs() -> Iterator[Case]:
    """What a recipe may do when it is run."""
    for command, kind, good in (("evaluate", "EvaluateConfig", EVALUATE), ("train", "TrainConfig", TRAIN)):
        plain = text(kind, good)
        yield recipe("as it is", command, plain, GOOD)
        yield recipe("with a BOM", command, "\ufeff" + plain, GOOD)
        for line in (
            "import sys; sys.exit(0)", "import sys; sys.exit()", "import sys; sys.exit(3)", "raise SystemExit('x')",
            "1 / 0", "raise KeyError", "raise Exception", "raise BaseException('x')", "raise MemoryError",
            "raise GeneratorExit",
            "raise StopIteration", "raise Exception('a' * 10**6)", "raise Exception('\\x1b[31m\\n\\nx')",
            "assert False", "import nowhere", "x = = 1", "x =", "\0", "\t x", "def f(): f()\nf()", "'a' + 1",
            "raise UnicodeDecodeError('a', b'', 1, 2, 'x')",
            "raise type('E', (Exception,), {'__str__': lambda s: 1 / 0})()", "config = None", "config = 1",
            "config = object", "import warnings; warnings.warn('x'); raise RuntimeWarning('y')",
            "raise ExceptionGroup('g', [ValueError('x')])", "(" * 1000, "raise OSError(2, 'No such file', 'x')",
            "raise BrokenPipeError", "import click; raise click.ClickException('x')",
            "import click; raise click.Abort", "import click; raise click.exceptions.Exit(0)",
            "from tokentm_jax import InputError; raise InputError('x')",
        ):
            yield recipe(line[:60], command, line + "\n")
        for line in ("print('hello')", "import sys; sys.stdout.write('\\ud800' * 0)",
                "import os; os.environ['X'] = '1'", "__name__", "open('/dev/null')"):
            yield recipe(f"{line} and a config", command, plain + line + "\n", GOOD)
        for note, content in (("empty", ""), ("noise", bytes(range(256))), ("Latin-1", "# é".encode("latin-1")),
                ("UTF-16", plain.encode("utf-16")), ("zip", base("classes.zip")), ("FIFO", fifo), ("folder", folder),
                ("/dev/zero", link("/dev/zero")),
                              ("self-symlink", link("r.py")), ("dangling", link("nowhere")),
                              ("10 GB", sparse(b"#", 10**10)), ("another kind",
                              text(*(("TrainConfig", TRAIN) if command == "evaluate"
                              else ("EvaluateConfig", EVALUATE))))):
            yield recipe(note, command, content)
        yield recipe("its folder is called x.py", command, folder, name="x.py",
            files={"x.py/__main__.py": "open('EXECUTED', 'w')"})
        for name in ("-r.py", "\x1b[31m.py", "é.py", "\udcff.py", "a b.py", "json.py", ".py", "r"):
            yield recipe(f"called {name!a}", command, plain, EITHER, name=name)
        for name in ("", "\0", "x" * 300 + ".py", "nowhere.py", "/", "/dev/stdin", "http://x/r.py"):
            yield Case(f"{command}: no recipe {name[:10]!a}", (command, name))


def cases(rng: random.Random) -> Iterator[Case]:
    first = [*programs(), *surely_wrong()]
    yield from first
    rest = list(fields())
    rng.shuffle(rest)
    yield from rest
