"""The fuzz suite under pytest: one test per area. See `fuzz/__init__.py` for its settings and how to repeat a case."""

import os

import pytest

# Some cases set limits between fork and exec, where JAX's threads do no harm.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:os.fork")]

AREAS = (
    *("photos", "checkpoints", "mat", "zips", "tables", "recipes", "runs", "stores", "shards", "arguments", "library"),
    "processes",
)


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    """The runner, with a folder of its own; it says at the end what was tried."""
    os.environ.setdefault("FUZZ_BASE", str(tmp_path_factory.mktemp("fuzz") / "base"))
    from fuzz import runner

    verdicts = []
    yield lambda area: verdicts.extend(found := runner.run_area(area)) or found
    print(f"\n{runner.summary(verdicts)}")


@pytest.mark.parametrize("area", AREAS)
def test_hostile_cases_are_answered_well(runner, area):
    from fuzz.runner import chosen, summary

    if not chosen(area):
        pytest.skip("no case of this area is chosen")
    found = runner(area)
    print(f"\n{area}: {summary(found)}")
    bad = [verdict for verdict in found if verdict.problems]
    if bad:
        pytest.fail(f"{len(bad)} of {len(found)} cases:\n" + "\n".join(map(str, bad)), pytrace=False)
