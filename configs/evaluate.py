"""Evaluates a finished probe, fine-tuning or supervised run, with the model and the data settings of its workdir.

    python -m scalr_jax.main --config=configs/evaluate.py:runs/probe --workdir=runs/probe_evaluated
    python -m scalr_jax.main --config=configs/evaluate.py:runs/probe --workdir=runs/probe_beams64 \\
        --config.data.sensors="('beams64',)"
    python -m scalr_jax.main --config=configs/evaluate.py:runs/probe --workdir=runs/probe_corrupted \\
        --config.task=robustness

on the validation split, on another sensor (PandaSet's are 'pandar64' and 'pandargt'), and under the corruptions of
`config.evaluate`. docs/evaluation.md says what comes out. Any key can be set, as --config.data.root=DIR.
"""

import json
from pathlib import Path

from scalr_jax import config as defaults
from scalr_jax.runtime.errors import InputError

# Settings of training alone.
TRAINING = (
    "label_fraction",
    "frame_list",
    "polarmix",
    "cutmix",
    "cutmix_ground",
    "pillarmix",
    "split",
    "weights",
    "scenes_per_step",
)


def get_config(checkpoint=""):
    config = defaults.get_config()
    config.task, config.checkpoint = "evaluate", checkpoint
    path = Path(checkpoint) / "config.json"
    try:
        written = json.loads(path.read_text())
        for part in ("data", "model"):
            kept = {key: value for key, value in written[part].items() if key in config[part] and key not in TRAINING}
            config[part].update({key: _tuples(value) for key, value in kept.items() if value is not None})
        config.seed = written["seed"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is not the config of a run ({error!r}); give the workdir of one: "
            "--config=configs/evaluate.py:WORKDIR"
        ) from None
    if config.data.dataset == "streets" and not config.data.root:
        config.data.root = str(Path(checkpoint) / "streets")  # where the run has rendered them
    config.data.split = "validation"
    return config


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
