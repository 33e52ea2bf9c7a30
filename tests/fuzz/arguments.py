"""Every option of every command with values that make no sense."""

# Tables of cases, several to a line.
# fmt: off

import random
from collections.abc import Iterator

import click

from fuzz.case import BAD, CHECKPOINT, EITHER, GOOD, Case, base

VALUES = (
    "", " ", "-1", "0", "1e3", "1.5", "nan", "inf", "99999999999999999999", "9" * 5000, "x", "é", "\0", "\udcff",
    "\x1b[31m", "../../x", "/", "/dev/zero", "nowhere", "a,b", ",", "true", "None", "=", "a=b", "a" * 300, "٣",
    "--json",
    "canary.txt", ".", "tfds:", "tfds:x:y", "tfds:../../x:test", "hf-hub:", "hf-hub:../../x", "hf-hub:x@y",
    "http://127.0.0.1:9/x", "0x10", "1_0", "+1", "’", "*", "[", "%s", "{}", "\n", "000000000000000000000000000000005",
)
COMMON = ("--checkpoint", CHECKPOINT, "--out", "out", "--batch-size", "2")
START = {
    "explain": ("explain", "photo.png", "--checkpoint", CHECKPOINT, "--out", "out", "--batch-size", "1"),
    "convert": ("convert", "tiny.safetensors", "out.safetensors"),
    "dataset": ("dataset", "data", *COMMON),
    "evaluate": ("evaluate", "evaluate.py", "--out", "out", "--limit", "2"),
    "compare": ("compare", "run"),
    "models": ("models",),
    "methods": ("methods",),
    "data": ("data",),
    "train": ("train", "train.py", "--out", "out"),
}
FILES = {name: base(name) for name in ("photo.png", "tiny.safetensors", "data", "evaluate.py", "train.py")}


def command(note: str, *arguments: str, expect: str = EITHER, names: str = "") -> Case:
    more = {"run": base("run")} if arguments[:1] == ("compare",) else {}
    return Case(note, arguments, files={**FILES, **more}, expect=expect, names=names, own=("cwd/run/*",))


def surely() -> Iterator[Case]:
    for name, start in START.items():
        yield command(f"{name} as it is", *start, expect=GOOD)
        yield command(f"{name} --help", name, "--help", expect=GOOD)
        yield command(f"{name} --nothing", *start, "--nothing", expect=BAD)
        yield command(f"{name} of nothing", name, expect=GOOD if name in ("models", "methods", "data") else BAD)
        yield command(f"{name} of an empty name", name, "", expect=BAD)
        yield command(f"{name} of a NUL", name, "a\0b", expect=BAD)
    for name in ("", "x", "\0", "\x1b[31m", "é" * 200, "--nothing", "-9"):
        yield command(f"no command {name[:9]!a}", name, expect=BAD)
    for option, values in (
        ("--target", ("5", "-1", "000000000000000000000000000000005", "9" * 100, "nobody", "", "\0", "1.5", "1_0",
        "0x1", "+1", "1e0", "ant,bee")),
        ("--method", ("", ",", "tokentn", "tokentm,,rollout", "ALL", "tokentm\0", "9" * 5000)),
        ("--option", ("ffn", "ffn=3", "=1", "ffn=nan", "first_block=-1", "first_block=1.5", "first_block=true",
        "first_block=99", "end_block=0", "end_block=true",
         "end_block=99999999999999999999", "original=x", "attention=", "__class__=1", "options=1", "direction=1",
         "a" * 5000 + "=1")),
        ("--batch-size", ("0", "-1", "1.5", "x", "99999", "", "True")),
        ("--checkpoint", ("", "nowhere", "/dev/zero", ".", "photo.png", "\0")),
        ("--model", ("", "x", "deit_tiny_patch16_224", "\0", "../x", "hf-hub:", "a" * 9999)),
        ("--out", ("photo.png", "photo.png/x", "/proc/x", "\0", "x" * 300, "/dev/null")),
        ("--classes", ("", "nowhere", "photo.png", ".", "\0")),
    ):
        for value in values:
            yield command(f"explain {option} {value[:30]!a}", *START["explain"], option, value, expect=BAD)
    for option, values in (
        ("--chunk-size", ("3", "0", "-2", "320000000000", "9" * 30)), ("--dtype", ("float64", "", "x", "int8")),
        ("--profile", ("", "x")), ("--target", ("x", "", "ant", "0")), ("--limit", ("0", "-1", "x", "1.5")),
        ("--methods", ("", ",", "x", "tokentm,tokentm")),
        ("--img-size", ("0", "15", "-1", "99999", "9" * 30)), ("--process", ("0", "-1")), ("--processes", ("0", "2")),
        ("--coordinator", ("x", "", "nowhere", "127.0.0.1:1")), ("--option", ("x=1", "x")),
        ("--batch-size", ("0", "9999", "x")),
    ):
        for value in values:
            yield command(f"dataset {option} {value[:30]!a}", *START["dataset"], option, value, expect=BAD)
    yield command("a chunk of 2**62", *START["dataset"], "--chunk-size", str(2**62), expect=BAD)
    yield command("a chunk of 10**7", *START["dataset"], "--chunk-size", str(10**7), expect=EITHER)
    yield command("process 3 of 2", *START["dataset"], "--coordinator", "127.0.0.1:1", "--processes", "2", "--process",
        "3", expect=BAD)
    for option, values in (
        ("--methods", ("", "x", ",", "tokentm,,")), ("--limit", ("0", "x", "-1")),
        ("--batch-size", ("0", "x", "9999")), ("--data", ("", "nowhere", "photo.png", "\0", "tfds:x", "/dev/zero")),
        ("--maps", ("", "nowhere", "data", "photo.png", "\0")), ("--model", ("", "x")),
        ("--checkpoint", ("", "nowhere", "data")), ("--out", ("photo.png", "photo.png/x", "\0", "/proc/x", "x" * 300)),
    ):
        for value in values:
            yield command(f"evaluate {option} {value[:30]!a}", *START["evaluate"], option, value, expect=BAD)
    for option, values in (("--epochs", ("0", "-1", "nan", "inf", "x", "1e308")), ("--limit", ("0", "x")),
            ("--train", ("", "nowhere", "photo.png", "\0", "tfds:x")), ("--test", ("", "nowhere")),
            ("--out", ("photo.png", "\0", "/proc/x", "photo.png/y"))):
        for value in values:
            yield command(f"train {option} {value[:30]!a}", *START["train"], option, value, expect=BAD)
    for option, values in (("--img-size", ("0", "7", "-1", "x", "99999", "9" * 30)),
            ("--model", ("", "x", "deit_tiny_patch16_224")), ("--classes", ("", "photo.png", "nowhere"))):
        for value in values:
            yield command(f"convert {option} {value[:30]!a}", *START["convert"], option, value, expect=BAD)


def cases(rng: random.Random) -> Iterator[Case]:
    yield from surely()
    from everything import everything

    rest = []
    for name, start in START.items():
        for parameter in everything.commands[name].params:
            for value in VALUES:
                if isinstance(parameter, click.Option) and parameter.opts[0] not in ("--help", "--json"):
                    if parameter.opts[0] == "--coordinator" and ":" in value:
                        continue  # would wait for others
                    if name == "train" and parameter.opts[0] == "--epochs" and value in ("1e3",):
                        continue  # is what it says
                    rest.append(command(f"{name} {parameter.opts[0]} {value[:20]!a}", *start, parameter.opts[0],
                        value))
                elif isinstance(parameter, click.Argument):
                    rest.append(command(f"{name} {value[:20]!a}", name, value))
    rng.shuffle(rest)
    yield from rest
