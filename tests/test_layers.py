"""Imports point one way, so that each layer can be read, and used, without the ones above it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "tokentm_jax"
LAYERS = [  # a module may import from layers above it in this list, and from its own
    {"errors"},
    {"files", "validation"},
    {"identity"},
    {"primitives", "tokentm", "metrics", "sharding"},
    {"vit", "maps", "preprocessing", "relevance"},
    {"trace"},
    {"stream"},
    {"attention_methods", "relevance_methods", "gradient_methods"},
    {"methods"},
    {"interface", "architectures"},
    {"checkpoint"},
    {"loading", "photos", "figure", "data", "sources"},
    {"train", "tasks"},
    {"records", "store"},
    {"report"},
    {"evaluate"},
    {"dataset"},
    {"terminal"},
    {"explaining"},
    {"cli"},
    {"__main__", "__init__"},
]


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, lazily or not, but not for type checking alone."""
    found = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and id(node) not in skipped
            and (node.module or "").startswith("tokentm_jax")
        ):
            tail = (node.module or "").removeprefix("tokentm_jax").lstrip(".")
            found |= {tail} if tail else {alias.name for alias in node.names}
    return found


def test_imports_point_one_way():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(rank)
    for path in PACKAGE.glob("*.py"):
        for name in imports(path):
            if path.stem == "__init__" or name == "__version__":
                continue
            assert rank[name] <= rank[path.stem], f"{path.stem} imports {name}"


def test_the_mathematics_needs_jax_alone():
    for name in ("tokentm", "primitives"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        roots = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        roots |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert roots <= {"jax", "chex", "annotated_types", "dataclasses", "collections", "functools", "math", "typing"}
