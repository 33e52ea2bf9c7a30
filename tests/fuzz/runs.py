"""Output folders of `tokentm evaluate` and `train`: damaged, of something else, or with files of the user's."""

# Tables of cases, several to a line.
# fmt: off

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz.case import BAD, BASE, EITHER, GOOD, Case, base, changed, damage, damaged, fifo, folder, link, sparse

MINE = ("cwd/run/*",)  # what a command may change there; the user's own files are checked by name


def compare(note: str, content: Any, expect: str = EITHER, **more: Any) -> Iterator[Case]:
    for arguments in (("run",), ("run", "other", "--json")):
        files = {"run": content, "other": base("run"), **more.get("files", {})}
        yield Case(f"compare {len(arguments)}: {note}", ("compare", *arguments), files=files, expect=expect,
            names="run" if expect == BAD else "")


def again(note: str, content: Any, expect: str = EITHER, **more: Any) -> Case:
    """`evaluate` into the folder."""
    files = {"run": content, "r.py": base("evaluate.py"), "data": base("data"), **more.pop("files", {})}
    return Case(f"evaluate: {note}", ("evaluate", "r.py", "--out", "run"), files=files, expect=expect,
        own=more.pop("own", MINE), names="run" if expect == BAD else "", **more)


def train(note: str, content: Any, expect: str = EITHER, **more: Any) -> Case:
    files = {"run": content, "r.py": base("train.py"), "data": base("data"), **more.pop("files", {})}
    return Case(f"train: {note}", ("train", "r.py", "--out", "run"), files=files, expect=expect,
        own=more.pop("own", MINE), **more)


def text(name: str, make: Callable[[str], str | bytes]) -> Any:
    """The run with another text in one of its files."""

    def change(path: Path) -> None:
        file = sorted(path.glob(name))[0]
        made = make(file.read_text())
        file.write_bytes(made.encode("utf-8", "surrogatepass") if isinstance(made, str) else made)

    return changed("run", change)


def put(name: str, make: Callable[[Path], object], of: str = "run") -> Any:
    """The run with one of its files replaced by something that is no file."""

    def change(path: Path) -> None:
        import shutil

        for file in sorted(path.glob(name))[:1] or [path / name]:
            if file.is_dir():
                shutil.rmtree(file)
            file.unlink(missing_ok=True)
            make(file)

    return changed(of, change)


FILES = ("results.json", "records/clean.jsonl", "records/tokentm-*.jsonl", "records/rollout-*.jsonl")
WRONG = (None, True, 0, -1, 1e400, "x", [], {}, [[]], [1], {"a": 1}, "\x1b[31m", 10**40, float("nan"))


def contents() -> Iterator[tuple[str, Any]]:
    for name in (*FILES, "identity.json", "records/identity.txt"):
        for note, make in (
            ("empty", lambda _: ""), ("[]", lambda _: "[]\n"), ("null", lambda _: "null\n"), ("{}", lambda _: "{}\n"),
            ("deep", lambda _: "[" * 200_000 + "\n"), ("deep objects",
            lambda _: '{"a":' * 100_000 + "1" + "}" * 100_000 + "\n"),
            ("noise", lambda _: bytes(range(256)) * 9 + b"\n"), ("Latin-1",
            lambda t: t.replace("a", "é").encode("latin-1")), ("twice", lambda t: t + t),
            ("cut", lambda t: t[: len(t) // 2]), ("a NUL", lambda t: t[:40] + "\0" + t[41:]),
            ("BOM", lambda t: "\ufeff" + t), ("long digits", lambda _: "9" * 10_000 + "\n"),
            ("a number", lambda _: "1\n"), ("NaN", lambda _: "NaN\n"), ("UTF-16", lambda t: t.encode("utf-16")),
        ):
            if "identity" not in name:
                yield f"{name} {note}", text(name, make)
            else:
                yield f"{name} {note}", put(name, lambda p, m=make: p.write_bytes(m("abc").encode()
                    if isinstance(m("abc"), str) else m("abc")))
        for note, make in (("FIFO", fifo), ("/dev/zero", lambda p: p.symlink_to("/dev/zero")),
                ("self-symlink", lambda p: p.symlink_to(p.name)), ("folder", folder), ("missing", lambda p: None),
                ("10 GB", lambda p: sparse(b"{", 10**10)(p))):
            yield f"{name} {note}", put(name, make)
    yield "records a file", put("records", lambda p: p.write_text("x"))
    yield "records missing", put("records", lambda p: None)
    yield "records a loop", put("records", lambda p: p.symlink_to("records"))
    yield from results()
    yield from records()


def results() -> Iterator[tuple[str, Any]]:
    def at(path: tuple[Any, ...], value: Any) -> Any:
        def make(content: str) -> str:
            document = json.loads(content)
            inside = document
            for key in path[:-1]:
                inside = inside[key]
            inside[path[-1]] = value
            return json.dumps(document)

        return text("results.json", make)

    places = [("run",), ("rows",), ("run", "config"), ("run", "seed"), ("run", "data"), ("run", "model"),
        ("run", "config", "rows"), ("run", "config", "task"), ("run", "config", "seed"), ("run", "config", "paper"),
        ("run", "config", "name"), ("run", "config", "options"), ("run", "config", "score")]
    places += [("run", "config", "rows", 0), ("run", "config", "rows", 0, "name"),
        ("run", "config", "rows", 0, "method"), ("run", "config", "rows", 0, "options"),
        ("run", "config", "rows", 1, "random_blocks"), ("run", "config", "batch_size")]
    for place in places:
        for value in WRONG:
            yield f"{'.'.join(map(str, place))} = {str(value)[:20]!a}", at(place, value)


def records() -> Iterator[tuple[str, Any]]:
    """Lines of records with the wrong content."""

    def lines(name: str, change: Callable[[Any], Any]) -> Any:
        def make(content: str) -> str:
            document = json.loads(content.splitlines()[0])
            rest = content.splitlines(keepends=True)[1:]
            made = change(document)
            return json.dumps(document if made is None else made) + "\n" + "".join(rest)

        return text(name, make)

    for name in FILES[1:]:
        for key in ("keys", "fields"):
            for value in WRONG:
                yield f"{name}: {key} = {str(value)[:20]!a}", lines(name, lambda d, k=key, v=value: d.update({k: v}))
            yield f"{name}: without {key}", lines(name, lambda d, k=key: d.pop(k) and None)
        for value in (*WRONG, [[1, 2], [3]], [1, "a"], ["nan"] * 2, [1, 2, 3], [[[1]]]):
            yield f"{name}: a field = {str(value)[:20]!a}", lines(name, lambda d,
                v=value: d["fields"].update({sorted(d["fields"])[0]: v}))
            yield f"{name}: a new field = {str(value)[:20]!a}", lines(name, lambda d,
                v=value: d["fields"].update(new=v))
            yield f"{name}: a key = {str(value)[:20]!a}", lines(name, lambda d, v=value: d["keys"].__setitem__(0, v))
        yield f"{name}: without a field", lines(name, lambda d: d["fields"].pop(sorted(d["fields"])[-1]) and None)
        yield f"{name}: the same keys twice", lines(name, lambda d: d["keys"].__setitem__(1, d["keys"][0]))


def foreign() -> Iterator[Case]:
    """Files that this program did not write stay as they are."""
    names = ("results.json", "results.md", "curves.png", "identity.json", "config.json", "log.jsonl",
        "records/clean.jsonl", "records/identity.txt", "records", "checkpoints/mine.txt", "tiny.safetensors",
        "notes.txt", "sub/notes.txt", ".lock")
    for name in names:
        for mine in ("mine", folder):
            files = {f"run/{name}": mine}
            yield Case(f"evaluate into a folder with the user's {name}", ("evaluate", "r.py", "--out", "run"),
                files={**files, "r.py": base("evaluate.py"), "data": base("data")}, expect=EITHER,
                own=("cwd/run/.lock",))
            yield Case(f"train into a folder with the user's {name}", ("train", "r.py", "--out", "run"),
                files={**files, "r.py": base("train.py"), "data": base("data")}, expect=EITHER, own=("cwd/run/.lock",))
    inside = changed("run", lambda path: (path / "notes.txt").write_text("mine"))
    yield again("a run with a file of the user's", inside, GOOD, own=("cwd/run/[!n]*",))


def cases(rng: random.Random) -> Iterator[Case]:
    yield from compare("as it is", base("run"), GOOD)
    yield again("as it is", base("run"), GOOD)
    yield train("as it is", base("trained"), GOOD)
    yield from foreign()
    yield again("a run of training", base("trained"), BAD, own=())
    yield train("a run of an evaluation", base("run"), BAD, own=())
    for note, content in (("missing", link("nowhere")), ("a file", "x"), ("FIFO", fifo), ("empty", folder),
            ("a store", base("store")), ("/dev/zero", link("/dev/zero")), ("self-symlink", link("run")),
            ("a training", base("trained"))):
        yield from compare(note, content, BAD)
    for name in ("", "\0", "x" * 300, "nowhere", "\x1b[31m", "/", "/proc/self", "..", "http://x/y"):
        yield Case(f"compare {name[:10]!a}", ("compare", name))
    for name in ("config.json", "log.jsonl", "identity.json", "checkpoints"):
        for note, make in (("FIFO", fifo), ("/dev/zero", lambda p: p.symlink_to("/dev/zero")), ("folder", folder),
                ("deep", lambda p: p.write_text("[" * 99_999)), ("empty", Path.touch),
                ("[]", lambda p: p.write_text("[]")), ("{}", lambda p: p.write_text("{}"))):
            yield train(f"{name} {note}", put(name, make, "trained"))
    for _ in range(6):
        yield train("damaged", damaged("trained", rng.getrandbits(32)))
    every = list(contents())
    rng.shuffle(every)
    for i, (note, content) in enumerate(every):
        if i % 4:
            yield next(compare(note, content))
        else:
            yield again(note, content)
    results_json = (BASE / "run" / "results.json").read_bytes()
    while True:
        yield next(compare("results.json damaged", changed("run", lambda p, c=damage(results_json, rng): (
            p / "results.json").write_bytes(c))))
        yield from compare("damaged", damaged("run", rng.getrandbits(32)))
