"""Make maps.npz: the maps of all methods on small random models, and what `capture` returns; see `test_maps`.

    python tests/goldens/make_maps.py          the cases that it has not yet, with its parameters
    python tests/goldens/make_maps.py --all    anew (jax 0.10.2, flax 0.12.8; about 11 minutes of one core)

KIND/METHOD,OPTIONS/DTYPE/FIELD    the field is "maps", or one of `tm.Trace`
KIND/params/NAME                   the parameters, in float32
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from test_maps import CASES, KINDS, RUNS, TEXTS, goldens, missing, model, parameters, results, saved_params  # noqa: E402

if anew := "--all" in sys.argv[1:]:
    arrays = {
        f"{kind}/params/{name}": np.asarray(array)
        for kind in (*KINDS, *TEXTS)
        for name, array in parameters(model(kind)[1])
    }
else:
    arrays = dict(goldens())
for name, dtype in RUNS if anew else missing():
    print(name, dtype, flush=True)
    kind = CASES[name][0]
    for field, array in results(name, dtype, model(kind)[1] if anew else saved_params(kind)).items():
        arrays[f"{name}/{dtype}/{field}"] = array
np.savez_compressed(HERE / "maps.npz", **arrays)
