"""Kills a sweep with kill -9 at random moments until it is done, and compares it with one left in peace.

    python -m tests.jobs.kill_sweep --kills 10 --config jobs/configs/demo.yaml

The sweep's tasks are those of the file and one whose questions share their texts.

Victims are the driver, an engine's actor and an engine's rank, on a Ray cluster of this command's own. A
killed driver is started again with the same command. Prints every kill; exit status 0 when both sweeps have
the same rows, none lost or doubled, and the same final table.
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.local import local_ray
from jobs.disk.record import read_plan, read_rows
from tests.jobs.swept import answers, num_lines

KINDS = ("rank", "engine", "driver")
_TITLES = {"rank": "ray::Shard", "engine": "ray::Engine"}
# Columns of the final table that are measured, and so differ from run to run: times, and what was reused.
_MEASURED = ("ttft", "tpot", "total", "e2e", "speedup", "decode", "queue", "memory", "per_s", "reuse")
# Two questions about each text: what a killed engine had kept of one is gone.
SHARED = {
    "name": "grid",
    "label": "shared",
    "depths": [0, 100],
    "questions": [
        {"needle": f"The code of {key} is {answer}.", "question": f"What is the code of {key}?",
         "answers": [answer]}
        for key, answer in (("lantern", "walnut"), ("harbor", "copper"))
    ],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One process that was killed."""

    kind: str
    pid: int
    rows: int
    after_s: float

    def __str__(self) -> str:
        return f"at {self.after_s:6.1f} s, {self.rows} rows: killed {self.kind} (pid {self.pid})"


class Killer:
    """Runs one sweep over and over until it ends by itself, and kills as it goes."""

    def __init__(self, config: Path, out: Path, env: Mapping[str, str], *, gap_s: float, seed: int) -> None:
        self._command = [sys.executable, "-m", "jobs.sweep", "--config", str(config), "--out", str(out)]
        self._out = out
        self._env = dict(env)
        self._gap_s = gap_s
        self._rng = random.Random(seed)
        self._started = time.monotonic()

    def run(self, kills: int) -> Iterator[Kill]:
        """Yields each kill. Raises RuntimeError when the driver ends in an error of its own."""
        kinds = [KINDS[i % len(KINDS)] for i in range(kills)]
        self._rng.shuffle(kinds)
        with (self._out.parent / "driver.log").open("wb") as log:
            driver = self._start(log)
            try:
                for kind in kinds:
                    # One in four hits wherever things stand, the start included; the others wait for a row,
                    # so that the sweep gets on between them.
                    if self._rng.random() < 0.75:
                        self._wait_for_rows(driver, num_lines(self._out) + 1)
                    time.sleep(self._rng.uniform(0.0, self._gap_s))
                    victim = self._victim(kind, driver)
                    if victim is None:
                        break
                    victim.kill()
                    yield Kill(
                        kind=kind,
                        pid=victim.pid,
                        rows=num_lines(self._out),
                        after_s=time.monotonic() - self._started,
                    )
                    if kind == "driver":
                        driver.wait()
                        driver = self._start(log)
                if driver.wait() != 0:
                    text = Path(log.name).read_text(errors="replace")
                    raise RuntimeError(f"the driver ended with {driver.returncode}:\n{text[-3000:]}")
            finally:
                driver.kill()
                driver.wait()

    def _start(self, log: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, env=self._env, stdout=log, stderr=log)

    def _wait_for_rows(self, driver: subprocess.Popen[bytes], count: int) -> None:
        while driver.poll() is None and num_lines(self._out) < count:
            time.sleep(0.05)

    def _victim(self, kind: str, driver: subprocess.Popen[bytes]) -> psutil.Process | None:
        """A running process of that kind; waits for one. None = the sweep is over."""
        while driver.poll() is None:
            if kind == "driver":
                return psutil.Process(driver.pid)
            found = [each for each in psutil.Process().children(recursive=True) if _is(each, _TITLES[kind])]
            if found:
                return self._rng.choice(found)
            time.sleep(0.05)
        return None


def _is(process: psutil.Process, title: str) -> bool:
    with suppress(psutil.Error):
        return any(part.startswith(title) for part in process.cmdline()[:1])
    return False


def table(folder: Path) -> list[dict[str, str]]:
    """The final table without what is measured."""
    with (folder / "report.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [{k: v for k, v in line.items() if not any(part in k for part in _MEASURED)} for line in lines]


def differences(killed: Path, peaceful: Path) -> list[str]:
    """What a sweep that was killed has other than one that was not; empty = nothing."""
    found = []
    keys = {sample.key for sample in read_plan(peaceful).samples}
    for folder in (killed, peaceful):
        rows = read_rows(folder)
        if missing := len(keys - set(rows)):
            found.append(f"{folder.name}: {missing} of {len(keys)} samples have no row")
        if doubled := num_lines(folder) - len(rows):
            found.append(f"{folder.name}: {doubled} rows are doubled")
        if failed := sum(row.error is not None for row in rows.values()):
            found.append(f"{folder.name}: {failed} samples failed")
    first, second = answers(killed), answers(peaceful)
    if different := [key for key in first if first[key] != second.get(key)]:
        found.append(f"{len(different)} rows differ, the first is {different[0]}")
    for folder in (killed, peaceful):
        if not any(row.reused_tokens for row in read_rows(folder).values()):
            found.append(f"{folder.name}: no sample reused anything of the one before")
    if table(killed) != table(peaceful):
        found.append("the final tables differ")
    return found


def run(
    config: Path, folder: Path, *, kills: int, gap_s: float = 2.0, seed: int = 0
) -> tuple[list[Kill], list[str]]:
    """Both sweeps in `folder`: the kills, and the differences."""
    data = yaml.safe_load(config.read_text(encoding="utf-8"))
    data["tasks"] = [*data["tasks"], SHARED]
    # A sample may be hit every time; how often it is tried changes no answer.
    data["attempts"] = kills + 1
    own = folder / "sweep.yaml"
    own.write_text(yaml.safe_dump(data), encoding="utf-8")
    done = []
    count = data.get("engine", {}).get("count", 1)
    with local_ray(num_cpus=max(2, count * data.get("engine", {}).get("num_threads", 1))) as env:
        for kill in Killer(own, folder / "killed", env, gap_s=gap_s, seed=seed).run(kills):
            print(kill, flush=True)
            done.append(kill)
        print("the sweep is done; the same again in peace", flush=True)
        command = [sys.executable, "-m", "jobs.sweep", "--config", str(own)]
        subprocess.run(
            [*command, "--out", str(folder / "peaceful")], env=env, check=True, stdout=subprocess.DEVNULL
        )
    return done, differences(folder / "killed", folder / "peaceful")


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 when the sweeps differ or there were too few kills."""
    parser = argparse.ArgumentParser(prog="python -m tests.jobs.kill_sweep")
    parser.add_argument("--config", type=Path, required=True, help="any sweep, a YAML file")
    parser.add_argument("--kills", type=int, default=10, help="processes to kill (default: 10)")
    parser.add_argument("--gap-s", type=float, default=10.0, help="most seconds between a row and a kill")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="kill-sweep-"))
    try:
        done, found = run(options.config, folder, kills=options.kills, gap_s=options.gap_s, seed=options.seed)
        for line in table(folder / "killed"):
            if line.get("task") == line.get("length_tokens"):
                print(line)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if len(done) < options.kills:
        found.append(f"the sweep was over after {len(done)} of {options.kills} kills: give it more samples")
    print("\n".join(found) or f"{len(done)} kills, and the final table is that of a sweep in peace")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
