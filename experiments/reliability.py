"""Shows what a run survives: damaged checkpoints, SIGKILL at any moment, and many steps and saves.

    python experiments/reliability.py damages --output=runs/reliability   # 100 damages; 7 minutes of a core
    python experiments/reliability.py kills --output=runs/reliability     # 20 at random, 10 inside a save; 7
    python experiments/reliability.py soak --output=runs/reliability      # 2,000 steps, 333 saves; 6

A tiny student on generated streets, on the CPU. Each case prints a line, and OUTPUT/<command>.json gathers them. Exit
code 0: all went as they should; 1: one did not.

damages  A bit is flipped in a file of the newest checkpoint, or the file is cut, zeroed or deleted; in every fifth case
         one of each checkpoint. Loading the workdir must name it and give the values of the checkpoint before, and the
         same command must move it aside and end with the state of the undisturbed run, bit for bit; where no checkpoint
         is left, both must say so and touch nothing.
kills    Runs are killed up to five times, started again, and must end with the state and the metrics of the undisturbed
         run, bit for bit.
soak     Descriptors, threads, compiled programs and memory of one long run, from a tenth of it to the end: those of its
         last quarter must not be more than those of its first.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import logging
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring
import numpy as np

from scalr_jax.main import run
from scalr_jax.runtime.checkpoint import load_variables, load_weights
from scalr_jax.runtime.command_line import use_cache
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import write_json

CONFIG = Path(__file__).parent.parent / "configs" / "smoke.py"
MOST_KILLS = 5  # of one run
MEMORY = 64  # MB that a soak may add; TensorStore 0.1.86 adds 20 kB a save (its metrics)


def tiny(output: Path, **changes: object) -> dict[str, Any]:
    """The keys of a tiny student on eight streets, which `output` keeps."""
    data = {"num_scenes": 8, "points_per_shard": 3072, "scenes_per_shard": 2, "max_points": 1500}
    keys = {f"data.{name}": value for name, value in {**data, "root": str(output / "streets")}.items()}
    return {**keys, "model.channels": 16, "model.depth": 1, **changes}


def run_here(keys: dict[str, Any], workdir: Path) -> None:
    """`scalr_jax.main` in this process, without its lines of progress."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.update_from_flattened_dict(keys)
    with contextlib.redirect_stdout(io.StringIO()):
        run(config, workdir)


def last_state(workdir: Path) -> Any:
    """Everything in the newest checkpoint."""
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    with warnings.catch_warnings(action="ignore"):  # of shardings that are not said
        return load_weights(newest)


def same(a: Any, b: Any) -> bool:
    """Whether two trees of arrays are the same bit for bit."""

    def content(tree: Any) -> list:
        leaves = [(path, np.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
        return [(path, leaf.dtype, leaf.shape, leaf.tobytes()) for path, leaf in leaves]

    return content(a) == content(b)


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target.parent, ignore_errors=True)
    return shutil.copytree(source, target)


# Damages


def flip(content: bytes, rng: random.Random) -> bytes:
    flipped = bytearray(content)
    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flipped": flip,
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
    "zeroed": lambda content, _: bytes(len(content)),
    "deleted": lambda *_: None,
}


class Heard(logging.Handler):
    """Gathers what is logged."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


def damage(step: Path, kind: str, rng: random.Random) -> str:
    """Damages a file of a checkpoint; its path in there."""
    path = rng.choice(sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size))
    content = DAMAGES[kind](path.read_bytes(), rng)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    return path.relative_to(step).as_posix()


def damages(output: Path, cases: int, seed: int) -> Iterator[dict]:
    """Cases as {"damage", "file", "wrong"}."""
    keys = tiny(output, num_steps=6, checkpoint_every_steps=2)
    whole, copy, rng = output / "damages" / "whole", output / "damages" / "case" / "run", random.Random(seed)
    run_here(keys, whole)
    final = last_state(whole)
    shutil.rmtree(copied(whole, copy) / "checkpoints" / "6")
    before = load_variables(copy / "checkpoints")
    heard = Heard()
    logging.getLogger("absl").addHandler(heard)
    for number in range(cases):
        kind, steps = list(DAMAGES)[number % len(DAMAGES)], ("4", "6") if number % 5 == 4 else ("6",)
        files = [damage(copied(whole, copy) / "checkpoints" / "6", kind, rng)]
        files += [damage(copy / "checkpoints" / step, kind, rng) for step in steps if step != "6"]
        heard.text = ""
        judge = _no_checkpoint_is_left if len(steps) > 1 else _the_one_before_is_used
        yield {"damage": kind, "file": ", ".join(files), "wrong": judge(keys, copy, files, heard, before, final)}
    logging.getLogger("absl").removeHandler(heard)


def _the_one_before_is_used(keys: dict, workdir: Path, files: list, heard: Heard, before: Any, final: Any) -> str:
    """The failure in words, "" when there was none."""
    if not same(load_variables(workdir / "checkpoints"), before):
        return "other values are loaded"
    if "step 6" not in heard.text or not (files[0] in heard.text or files[0] == "digests.json"):
        return "it is not named"
    run_here(keys, workdir)
    if not same(last_state(workdir), final):
        return "the resumed run ends with other values"
    return "" if (workdir / "checkpoints.damaged" / "6").is_dir() else "it is not moved aside"


def _no_checkpoint_is_left(keys: dict, workdir: Path, files: list, heard: Heard, before: Any, final: Any) -> str:
    for act in (lambda: load_variables(workdir / "checkpoints"), lambda: run_here(keys, workdir)):
        try:
            act()
            return "damaged values are loaded"
        except InputError as error:
            if "step 6" not in str(error) or "step 4" not in str(error):
                return f"another sentence: {error}"
    return "" if len(list((workdir / "checkpoints").iterdir())) == 2 else "a checkpoint was moved"


# Kills


class Runner(NamedTuple):
    """Starts the command as a process of its own."""

    keys: dict[str, Any]
    log: Path

    def start(self, workdir: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "scalr_jax.main", f"--config={CONFIG}", f"--workdir={workdir}"]
        command += [f"--config.{name}={value}" for name, value in self.keys.items()]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.log.parent / "compiled")}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
        with self.log.open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **cache})

    def finish(self, workdir: Path) -> float:
        """Seconds of a run to its end."""
        begun = time.monotonic()
        if code := self.start(workdir).wait():
            raise SystemExit(f"{workdir} ended with {code}, see {self.log}")
        return time.monotonic() - begun


def metrics(workdir: Path) -> dict[int, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def kills(output: Path, at_random: int, inside: int, seed: int) -> Iterator[dict]:
    """Killed processes as {"kill", "after", "wrong"}; "wrong" is known when their run ends, and told with its last."""
    folder, rng = output / "kills", random.Random(seed)
    runner = Runner(tiny(output, num_steps=24, checkpoint_every_steps=1), folder / "log.txt")
    (folder / "whole").mkdir(parents=True, exist_ok=True)
    runner.finish(folder / "whole")  # compiles, and renders the streets
    seconds = runner.finish(folder / "again")
    final, losses = last_state(folder / "whole"), metrics(folder / "whole")
    wrong = "" if same(last_state(folder / "again"), final) else "the same run twice differs"
    kinds = ["at random"] * at_random + ["inside a save"] * inside
    rng.shuffle(kinds)
    number, killed = 0, 0  # of this run
    while kinds:
        workdir = folder / f"run{number}"
        process, begun = runner.start(workdir), time.monotonic()
        hit = _kill(process, workdir / "checkpoints", kinds[-1], rng, seconds)
        ended = process.wait() == 0
        done = {"kill": kinds.pop(), "after": round(time.monotonic() - begun, 2)} if hit else None
        killed += hit
        if ended or killed == MOST_KILLS or not kinds:
            runner.finish(workdir)
            if not same(last_state(workdir), final) or metrics(workdir) != losses:
                wrong = f"{workdir} ends with another state or other metrics"
            number, killed = number + 1, 0
        if done:
            yield {**done, "wrong": wrong}


def _kill(process: subprocess.Popen, checkpoints: Path, kind: str, rng: random.Random, seconds: float) -> bool:
    """Kills a run; whether it was alive and, where that is asked for, in the middle of a save."""
    begun, moment = time.time(), rng.uniform(0, seconds)
    saving: list[Path] = []
    if kind == "at random":
        time.sleep(moment)
    else:
        first = begun + min(moment, seconds / 2)  # from then on
        while process.poll() is None and not saving:
            time.sleep(0.002)
            found = [path for path in checkpoints.glob("*.orbax-checkpoint-tmp") if time.time() > first]
            saving = [path for path in found if path.exists() and path.stat().st_mtime > begun]
        time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    return process.wait() != 0 and (kind == "at random" or any(path.exists() for path in saving))


# Soak


def soak(output: Path, steps: int, saves: int) -> Iterator[dict]:
    """{"step", "descriptors", "threads", "programs", "megabytes", "wrong"} of the first quarter, and of the last."""
    workdir, samples, done, programs = output / "soak", [], threading.Event(), []
    shutil.rmtree(workdir, ignore_errors=True)

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        programs.append(event) if "backend_compile" in event else None

    def watch() -> None:
        while not done.wait(0.2):
            reached = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
            if reached and steps // 10 <= max(reached) < steps:
                samples.append({"step": max(reached), **_usage(), "programs": len(programs)})

    jax.monitoring.register_event_duration_secs_listener(listen)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run_here(tiny(output, num_steps=steps, checkpoint_every_steps=max(1, steps // saves)), workdir)
    finally:
        done.set()
        watcher.join()
    quarter = len(samples) // 4 + 1
    least = dict.fromkeys(("descriptors", "threads", "megabytes"), min)  # a save in progress has more
    first, last = (
        {key: least.get(key, max)(sample[key] for sample in part) for key in samples[0]}
        for part in (samples[:quarter], samples[-quarter:])
    )
    grown = [key for key in ("descriptors", "threads", "programs") if last[key] > first[key]]
    grown += ["megabytes"] if last["megabytes"] > first["megabytes"] + MEMORY else []
    yield {**first, "wrong": ""}
    yield {**last, "wrong": f"more {', '.join(grown)} than before" if grown else ""}


def _usage() -> dict[str, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "megabytes": megabytes,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("damages", "kills", "soak"))
    parser.add_argument("--output", type=Path, required=True, help="where runs and results go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100, help="damages: how many")
    parser.add_argument("--random", type=int, default=20, help="kills: how many at random moments")
    parser.add_argument("--inside", type=int, default=10, help="kills: how many inside a save")
    parser.add_argument("--steps", type=int, default=2000, help="soak: how many")
    parser.add_argument("--saves", type=int, default=300, help="soak: how many at least")
    given = parser.parse_args(arguments)
    output = given.output.absolute()
    use_cache(output / "compiled")
    cases = {
        "damages": lambda: damages(output, given.cases, given.seed),
        "kills": lambda: kills(output, given.random, given.inside, given.seed),
        "soak": lambda: soak(output, given.steps, given.saves),
    }
    shutil.rmtree(output / given.command, ignore_errors=True)
    results = []
    for result in cases[given.command]():
        results.append(result)
        print(len(results), "  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    wrong = sum(bool(result["wrong"]) for result in results)
    counts = collections.Counter(result.get("damage") or result.get("kill") or given.command for result in results)
    write_json(output / f"{given.command}.json", {"counts": counts, "wrong": wrong, "results": results})
    print(f"{given.command}: {len(results)} results ({dict(counts)}), {wrong} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
