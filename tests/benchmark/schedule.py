"""How near to the ideal 100 hosts finish 100,000 shards while hosts are preempted: a simulation, no measurement.

    python tests/benchmark/schedule.py          # seconds; the same numbers on every machine

A shard takes 20 s (10,000 images at 500 images/s), and between 10 and 40 s where images differ. Hosts differ in speed
by 10 %. Each is preempted every 2 hours on average, loses the shards that it computes, is replaced after 10 minutes on
average, and then needs a minute to start. The ideal has the same hosts with the same absences, and no other loss: all
shards can be divided, nothing is lost, and all hosts end at the same moment.

- `pull`: a host takes the next shard when it is free, as Ray's workers do. A lost shard is noticed after 30 s.
- `array of N`: `--shard i/N` in a job array of N tasks. A free host takes the next task, which starts in a minute.
  A preempted task is queued again, and goes on with the first of its shards that is not finished. With as many tasks
  as hosts, the shards of each host are fixed.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import parser, publish, table

HOSTS, SHARDS = 100, 100_000
SECONDS, SPREAD = 20, 0.35  # of a shard: the median, and sigma of the logarithm
SPEEDS = 0.1  # standard deviation among hosts
UP, AWAY, START, NOTICED = 2 * 3600, 600, 60, 30  # seconds
SEEDS = 5


class World(NamedTuple):
    work: np.ndarray  # seconds of each shard on a host of speed 1
    speed: np.ndarray
    seed: int

    def times_up(self, host: int) -> Iterator[tuple[float, float]]:
        """When the host is there: from, to."""
        rng, now = np.random.default_rng((self.seed, host)), 0.0
        while True:
            end = now + rng.exponential(UP)
            yield now, end
            now = end + rng.exponential(AWAY)


def world(seed: int) -> World:
    rng = np.random.default_rng(seed)
    work = np.clip(rng.lognormal(np.log(SECONDS), SPREAD, SHARDS), SECONDS / 2, SECONDS * 2)
    return World(work, np.clip(rng.normal(1, SPEEDS, HOSTS), 0.5, 1.5), seed)


def ideal(given: World) -> float:
    """When the hosts that are there have had time for all work."""
    changes: list[tuple[float, float]] = []
    horizon = 10 * given.work.sum() / given.speed.sum()
    for host in range(HOSTS):
        for start, end in given.times_up(host):
            changes += [(start, given.speed[host]), (end, -given.speed[host])]
            if end > horizon:
                break
    left, speed, now = given.work.sum(), 0.0, 0.0
    for time, change in sorted(changes):
        if speed and left <= speed * (time - now):
            return now + left / speed
        left, speed, now = left - speed * (time - now), speed + change, time
    raise AssertionError("the horizon is too near")


def run(given: World, tasks: list[list[int]], starting: float) -> float:
    """When the last shard is finished; free hosts take the next task, and a lost one is queued again."""
    waiting, idle = deque([*task] for task in tasks), []
    up = [given.times_up(host) for host in range(HOSTS)]
    end = [0.0] * HOSTS
    left, now = SHARDS, 0.0
    events: list[tuple[float, int, int, list[int]]] = []  # time, what, host, task
    FREE, DONE, LOST, BACK = range(4)
    for host in range(HOSTS):
        _, end[host] = next(up[host])
        heapq.heappush(events, (START, FREE, host, []))
    while left:
        now, what, host, task = heapq.heappop(events)
        if what == DONE:
            left -= 1
            task.pop(0)
        elif what == BACK:
            waiting.append(task)
            if idle:
                heapq.heappush(events, (now, FREE, idle.pop(), []))
            continue
        elif what == LOST:
            if task:
                heapq.heappush(events, (now + NOTICED, BACK, host, task))
            start, end[host] = next(up[host])
            heapq.heappush(events, (start + START, FREE, host, []))
            continue
        before = now
        if not task:
            if not waiting:
                idle.append(host)  # its preemptions matter no more
                continue
            task, before = waiting.popleft(), now + starting
        done = before + given.work[task[0]] / given.speed[host]
        heapq.heappush(events, (done, DONE, host, task) if done < end[host] else (end[host], LOST, host, task))
    return now


def main(out: Path | None) -> None:
    schedules = {
        "pull": ([[i] for i in range(SHARDS)], 0.0),
        **{f"array of {n:,}": ([[*range(i, SHARDS, n)] for i in range(n)], START) for n in (100, 1000, 2000, 10_000)},
    }
    ratios: dict[str, list[float]] = {name: [] for name in schedules}
    best = []
    for seed in range(SEEDS):
        given = world(seed)
        best.append(ideal(given))
        for name, (tasks, starting) in schedules.items():
            ratios[name].append(run(given, tasks, starting) / best[-1])
    rows = [(name, f"{np.mean(found):.3f}", f"{max(found):.3f}") for name, found in ratios.items()]
    notes = (
        f"The ideal: {np.mean(best) / 3600:.2f} hours on {HOSTS} hosts for {SHARDS:,} shards; {SEEDS} random worlds."
    )
    publish(out, "# Schedules", table(["schedule", "time / ideal, mean", "largest"], rows), notes)


if __name__ == "__main__":
    main(parser(__doc__).parse_args().out)
