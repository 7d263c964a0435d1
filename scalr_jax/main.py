"""Pretrain, probe, fine-tune or evaluate: one config is one experiment.

    python -m scalr_jax.main --config=configs/demo.py --workdir=runs/demo
    python -m scalr_jax.main --config=configs/pandaset_mini.py --workdir=runs/panda --config.data.root=PANDASET

Any key of the config can be set: --config.num_steps=100 --config.data.num_workers=4. The same command again resumes.
Exit codes: 0 done, or stopped as asked (SIGTERM, Ctrl-C while training) and saved; 2 bad arguments, config or input
(one sentence on stderr); 1 a defect.

Flags:
    --config               a config file of configs/ (required)
    --workdir              where config.json, metrics.jsonl, checkpoints/, results.json and figures/ go (required)
    --profile              START:STOP: an XProf trace of the steps from START to before STOP, in WORKDIR/profile
    --cache                folder of compiled programs, found again by the next run; none: they are not kept (default:
                           the user's cache)
    --coordinator_address  host:port of process 0, for several processes without a detected cluster
    --num_processes        how many there are
    --process_id           which one this is, from 0
    --connect_seconds      how long processes wait for one another at the start (default 120)
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from scalr_jax.config import Settings, all_keys
from scalr_jax.runtime import stopping
from scalr_jax.runtime.command_line import exit_codes, fail, parse_flags, require, sentence_of, use_cache
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a config file.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files go.")
PROFILE = flags.DEFINE_string("profile", None, "START:STOP.")
CACHE = flags.DEFINE_string("cache", None, "Folder of compiled programs.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which process this is.")
CONNECT_SECONDS = flags.DEFINE_integer("connect_seconds", 120, "How long to wait.", 1, 86_400)


def parse(arguments: list[str]) -> list[str]:
    """The flags, for `app.run`."""
    with exit_codes():
        listed = "\n".join(f"    {row.name} = {row.default!r}: {row.meaning}" for row in all_keys())
        parse_flags(flags.FLAGS, arguments, f"{__doc__}\nConfig keys, as in --config.KEY=VALUE:\n{listed}")
        require(flags.FLAGS, "config", "workdir", example="--config=configs/demo.py --workdir=runs/demo")
    return arguments[:1]


def run(config: ConfigDict, workdir: Path) -> None:
    """Checks the whole config, and does what `config.task` says. Raises `InputError`."""
    perform(read_settings(config), workdir)


def perform(settings: Settings, workdir: Path) -> None:
    """Does what `config.task` says."""
    from scalr_jax import tasks
    from scalr_jax.demo.run import run_demo
    from scalr_jax.demo.teacher import train_teacher

    named = (tasks.distill, tasks.probe, tasks.finetune, tasks.evaluate, tasks.robustness)
    functions: dict = {**{f.__name__: f for f in named}, "demo": run_demo, "teacher": train_teacher}
    functions[settings.run.task](settings, workdir)
    _say_next(settings.run.task, workdir)


def _say_next(task: str, workdir: Path) -> None:
    """Prints where the results are, and what to try next with the model of a workdir."""
    import jax

    model = workdir / "probe_distilled" if task == "demo" else workdir
    if jax.process_index() != 0 or not (model / "settings.json").exists():
        return
    written = [path for path in (workdir / "results.json", *sorted(workdir.glob("figures/*.png"))) if path.exists()]
    print(f"results and pictures: {', '.join(map(str, written))}")
    print(f"next, look at an unseen scan: python -m scalr_jax.visualize --model={model} --output={workdir}/pictures")


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    with stopping.heard():
        try:
            _main()
        except stopping.Preempted as stop:
            print(stop, flush=True)


def _profile(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if not found:
        raise InputError(f"--profile={text} is not START:STOP, two numbers of steps, as in 100:110")
    return int(found[1]), int(found[2])


def _main() -> None:
    with exit_codes():
        if PROFILE.value is not None:
            CONFIG.value.profile = _profile(PROFILE.value)
        settings = read_settings(CONFIG.value)
    if settings.run.task == "demo":  # a busy laptop needs no alarm that "Very slow compile?" may be a bug of XLA
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax

    from scalr_jax.runtime import distributed

    try:
        distributed.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, CONNECT_SECONDS.value)
        if CACHE.value or "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            use_cache(CACHE.value)
        perform(settings, Path(WORKDIR.value or ""))
    except (Exception, KeyboardInterrupt) as error:
        resumes = "the same command resumes from the last checkpoint"
        sentence = sentence_of(error, interrupted=resumes, full=f"free space for {WORKDIR.value}, and {resumes}")
        if sentence is not None:
            distributed.end_if_not_alone(2, sentence)
            fail(sentence)
        traceback.print_exc()
        peer = isinstance(error, jax.errors.JaxRuntimeError)  # a collective that failed
        distributed.end_if_not_alone(1, distributed.LOST if peer else "a defect, see above; the other processes stop")
        sys.exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
