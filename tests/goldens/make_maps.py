"""Make maps.npz: the maps of all methods on small random models, and what `capture` returns; see `test_maps`.

    python tests/goldens/make_maps.py    (jax 0.10.2, flax 0.12.8; about 11 minutes of one core)

KIND/METHOD,OPTIONS/DTYPE/FIELD    the field is "maps", or one of `tm.Trace`
KIND/params/NAME                   the parameters, in float32
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from test_maps import CASES, KINDS, RUNS, TEXTS, model, parameters, results  # noqa: E402

arrays = {
    f"{kind}/params/{name}": np.asarray(array)
    for kind in (*KINDS, *TEXTS)
    for name, array in parameters(model(kind)[1])
}
for name, dtype in RUNS:
    print(name, dtype, flush=True)
    for field, array in results(name, dtype, model(CASES[name][0])[1]).items():
        arrays[f"{name}/{dtype}/{field}"] = array
np.savez_compressed(HERE / "maps.npz", **arrays)
