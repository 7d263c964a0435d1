"""Pretrain, probe, fine-tune or evaluate: one config is one experiment.

    python -m scalr_jax.main --config=configs/demo.py --workdir=runs/demo
    python -m scalr_jax.main --config=configs/pandaset_mini.py --workdir=runs/panda --config.data.root=PANDASET

Any key of the config can be set: --config.num_steps=100 --config.data.num_workers=4. The same command again resumes.
Exit codes: 0 done; 2 bad arguments, config or input (one sentence on stderr); 1 a defect.

Flags:
    --config               a config file of configs/ (required)
    --workdir              where config.json, metrics.jsonl, checkpoints/, results.json and figures/ go (required)
    --coordinator_address  host:port of process 0, for several processes without a detected cluster
    --num_processes        how many there are
    --process_id           which one this is, from 0
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from scalr_jax.data.scenes import InputError

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a config file.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files go.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which process this is.")


def one_sentence(error: BaseException) -> str:
    text = str(error)
    if "Traceback (most recent call last)" in text:  # ml_collections hands on what a config file raised with its trace
        text = text.strip().splitlines()[-1]
    return " ".join(text.split())


def fail(message: str) -> NoReturn:
    """Exit with code 2 and one sentence on stderr."""
    print(f"scalr_jax: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_flags(arguments: list[str]) -> list[str]:
    """absl's parsing, with --help and mistakes as users expect them."""
    if any(argument in ("--help", "-h", "-help") for argument in arguments[1:]):
        print(__doc__)
        sys.exit(0)
    try:
        rest = flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError, ImportError, SyntaxError) as error:
        fail(one_sentence(error))
    if rest[1:]:
        fail(f"unexpected arguments: {' '.join(rest[1:])}; flags begin with --")
    try:
        missing = CONFIG.value is None or not CONFIG.value.items() or WORKDIR.value is None
    except OSError as error:  # ml_collections reports a config that does not load when it is first looked at
        fail(one_sentence(error).removeprefix("Configuration is not available because of an earlier failure to load: "))
    if missing:
        fail("--config and --workdir are required, as in --config=configs/demo.py --workdir=runs/demo")
    return rest


def start_distributed() -> None:
    """`jax.distributed.initialize` when flags or a cluster ask for it; one process needs none."""
    import jax

    if COORDINATOR.value is not None:
        jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    elif any(name in os.environ for name in ("TPU_WORKER_HOSTNAMES", "SLURM_JOB_NUM_NODES", "MEGASCALE_NUM_SLICES")):
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            logging.warning("no cluster was detected, running alone: %s", one_sentence(error))


def run(config, workdir: Path) -> None:
    """Dispatch on `config.task`."""
    from scalr_jax import tasks
    from scalr_jax.config import check_keys

    check_keys(config)
    known = {
        "distill": tasks.distill,
        "probe": tasks.probe,
        "finetune": tasks.finetune,
        "evaluate": tasks.evaluate,
        "demo": tasks.demo,
        "teacher": tasks.teacher,
    }
    if config.task not in known:
        raise InputError(f"config.task = {config.task!r} is none of {', '.join(known)}")
    known[config.task](config, workdir)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        start_distributed()
        run(CONFIG.value, Path(WORKDIR.value or ""))
    except InputError as error:
        fail(one_sentence(error))
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        fail(one_sentence(error))
    except KeyboardInterrupt:
        fail("interrupted; the same command resumes from the last checkpoint")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
