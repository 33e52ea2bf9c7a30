"""Execute the notebooks of this folder; an error in any cell is fatal.

python notebooks/execute.py                       # all
python notebooks/execute.py 2_equations --write   # one; with its outputs it replaces the file
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

os.environ.setdefault("TOKENTM_DATA", str(Path(__file__).resolve().parents[2] / "shared/data"))
paths = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.ipynb"))}
named = [name for name in sys.argv[1:] if not name.startswith("--")]
for path in [paths[name] for name in named] or paths.values():
    began = time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    if "--write" in sys.argv:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times, which are others at every run
        nbformat.write(notebook, path)
    count = sum(cell.cell_type == "code" for cell in notebook.cells)
    print(f"{path.name}: {count} cells executed in {time.monotonic() - began:.0f} s", flush=True)
