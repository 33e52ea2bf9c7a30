"""The scripts that chose the default method and the metrics to trust, `mixes.py` and `agreement.py`, on few scenes."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from tokentm_jax.cli.recipes import read_recipe
from tokentm_jax.configs import rows
from tokentm_jax.runs.evaluate import evaluate
from tokentm_jax.runs.leaderboard import LeaderboardConfig
from tokentm_jax.runs.report import open_finished

CONFIGS = Path(__file__).parents[1] / "configs"
SCENES = 12
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "benchmark")
        import agreement
        import mixes

        yield mixes, agreement
        for name in ("agreement", "mixes", "common"):
            sys.modules.pop(name, None)


def test_mixes_are_those_of_the_method(scripts, tmp_path, monkeypatch):
    """The mix of recorded maps is the map of `tokentm_mix`, and its columns are the figures of the task."""
    mixes, _ = scripts
    monkeypatch.setattr(mixes, "MEMBERS", rows(*mixes.DEFAULT, "tokentm_mix"))
    monkeypatch.setattr(mixes, "LIMITS", {"xor": SCENES})
    data = mixes.recorded("xor", tmp_path)
    mix = mixes.mixed([data.maps[name] for name in mixes.DEFAULT])
    np.testing.assert_allclose(mix, data.maps["tokentm_mix"], atol=1e-5)

    halves = mixes.measured(mixes.DEFAULT, {"xor": data})
    np.testing.assert_allclose(halves, mixes.measured(("tokentm_mix",), {"xor": data}), atol=1e-4)
    known = {f["metric"]: f["value"] for f in open_finished(tmp_path).figures if f["method"] == "tokentm_mix"}
    counts = np.array([(data.odd == half).sum() for half in range(2)])
    assert counts.min() > 0 and counts.sum() == len(mix)
    correlation, on_causes = counts @ halves / counts.sum()
    np.testing.assert_allclose(correlation, known["linear_correlation"], atol=1e-4)
    np.testing.assert_allclose(1 - on_causes, known["without_effect"], atol=1e-4)


def tau_b(a, b):
    """Kendall's tau-b, pair by pair."""
    pairs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i in range(len(a)) for j in range(i)]
    x, y = np.array(pairs).T
    return (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())


def test_agreement_is_that_of_the_figures(scripts, tmp_path):
    """The values of all images are the figures of the runs, with their signs, and tau is that of all pairs."""
    _, agreement = scripts
    config = read_recipe(CONFIGS / "agreement.py:data=xor", LeaderboardConfig)
    methods = rows("tokentm", "gae", "rollout", "raw_attention")
    finished = {}
    for own in config.runs:
        if own.name in ("effects", "srg_mean"):
            own = dataclasses.replace(own, rows=methods, limit=SCENES)
            evaluate(own, out=tmp_path / own.name)
            finished[own.name] = open_finished(tmp_path / own.name)
    model = agreement.measured(tmp_path)
    assert model.methods == [row.name for row in methods]

    def figures(run, metric):
        found = {f["method"]: f["value"] for f in finished[run].figures if f["metric"] == metric}
        return np.array([found[name] for name in model.methods])

    (cause,) = model.causes.values()
    np.testing.assert_allclose(cause[0], figures("effects", "linear_correlation"), atol=1e-6)
    np.testing.assert_allclose(model.metrics["srg (mean)"][0], figures("srg_mean", "srg"), atol=1e-6)
    first, last = (model.metrics[f"{which}_first (mean)"][0] for which in ("most", "least"))
    np.testing.assert_allclose(first + last, figures("srg_mean", "srg"), atol=1e-6)  # a difference of two areas
    tau = agreement.agreement(model.metrics["srg (mean)"], cause)
    assert tau.shape == (1 + agreement.RESAMPLES,)
    for draw in (0, 1, 77):
        assert tau[draw] == pytest.approx(tau_b(model.metrics["srg (mean)"][draw], cause[draw]))
