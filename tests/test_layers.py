"""A file may import from its own room and from the rooms before it, so that each can be read without those after."""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "tokentm_jax"
ROOMS = [
    "",
    "maths",
    "data",
    "inputs",
    "models",
    "programs",
    "methods",
    "metrics",
    "configs",
    "runs",
    "cli",
]  # "": beside them


def room(path: Path) -> str:
    """The folder of a file, or the file itself where it is a room."""
    if path.parent != PACKAGE:
        return path.parent.name
    return path.stem if path.stem in ROOMS else ""


def imports(path: Path) -> set[str]:
    """Modules that a file imports, lazily or not, those for type checking among them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_go_to_earlier_rooms():
    files = [p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py")]
    assert {room(p) for p in files} == set(ROOMS)
    for path in files:
        own = ROOMS.index(room(path))
        for name in imports(path):
            package, _, rest = name.partition(".")
            imported = rest.partition(".")[0]
            if package == "tokentm_jax" and imported in ROOMS:
                assert ROOMS.index(imported) <= own, f"{path.relative_to(PACKAGE)} imports {name}"


def test_no_imports_go_in_a_circle():
    files = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    left = {}
    for name, path in files.items():
        found = {each if each in files else each.rpartition(".")[0] for each in imports(path)}
        left[name] = (found & files.keys()) - {name}
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    assert not left, {name: found & left.keys() for name, found in left.items()}


def test_the_mathematics_needs_jax_alone():
    known = {"jax", "numpy", "chex", "jaxtyping", "annotated_types"} | sys.stdlib_module_names
    for path in (PACKAGE / "maths").glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= known | {"tokentm_jax"}, path


def test_a_modality_is_known_to_its_file_only():
    """Elsewhere nothing asks which modality an input or a reader is of: it calls their members."""
    classes = {"Texts", "Tokens", "Prompts", "Images", "WordPieces", "PromptReader", "Preprocessing", "Recording"}
    for path in PACKAGE.rglob("*.py"):
        if room(path) in ("inputs", "data"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                asked |= {name.attr for name in ast.walk(node.args[1]) if isinstance(name, ast.Attribute)}
                assert not asked & classes, f"{path.relative_to(PACKAGE)}:{node.lineno}"


def test_the_package_does_not_train():
    """Training is in `models/training`, which is not in the wheel; optax comes with it."""
    for path in PACKAGE.rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"models", "optax"}, path


def test_only_the_inputs_know_their_kinds():
    """Elsewhere, what differs between images, recordings and texts is a member of the reader or of the inputs."""
    kinds = {
        "Images",
        "Passage",
        "Preprocessing",
        "Prompts",
        "PromptReader",
        "Recording",
        "Texts",
        "Tokens",
        "WordPieces",
    }
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if room(path) not in ("inputs", "data") else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {inner.id for inner in ast.walk(node.args[1]) if isinstance(inner, ast.Name)}
                assert not asked & kinds, f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}"
