"""`python -m fuzz [AREA...]` (with `tests` on the path): runs the cases outside pytest; exit code 1 if one fails."""

import os
import sys
import tempfile
import time
from pathlib import Path


def main(areas: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("FUZZ_BASE", str(Path(folder) / "base"))
        from fuzz import runner

        began, verdicts = time.monotonic(), []
        for area in areas or runner.AREAS:
            found = runner.run_area(area) if runner.chosen(area) else []
            if found:
                print(f"{area}: {runner.summary(found)}", flush=True)
            verdicts += found
        print(f"{runner.summary(verdicts)}; {time.monotonic() - began:.0f} s in all")
        return int(any(verdict.problems for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
