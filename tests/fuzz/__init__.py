"""The project's fuzz suite: hostile cases for every input of the library, each with a mechanical verdict.

    make fuzz                                    all cases
    FUZZ_ONLY=mat-017 make fuzz                  one case, whose folder is kept (or an area, or several with commas)
    FUZZ_SEED=1 FUZZ_CASES=5000 make fuzz        other random cases, and more of them
    FUZZ_SHARE=0.2 make fuzz                     every fifth case
    FUZZ_PATIENCE=3 make fuzz                    three times the seconds, on a machine that is busy
    FUZZ_CODE=/other/clone make fuzz             the package of another clone

A case (`case.py`) is plain data: files to make, a command line or a call, and what a good answer is. A worker process
(`worker.py`) runs it, `runner.py` watches over the worker and judges. The other files hold one area of cases each.
"""
