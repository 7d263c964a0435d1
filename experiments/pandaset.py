"""PandaSet's real labelled frames: a probe of random and of distilled students beside supervised training.

    python experiments/pandaset.py --root=PANDASET --output=runs/results_pandaset --seed=0
    python experiments/report.py --output=runs/results_pandaset --classes

One scene, 002: frames up to 42 are trained on, frames from 48 on are validated on, Pandar64's whole turn. The teacher
is the packaged one, which has only seen generated streets. Then all models are evaluated on the PandarGT's points. The
same command goes on where it stopped. About half an hour a seed on 2 idle cores.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

from streets import Config, Part, _load, make_parser, run_all

from scalr_jax.data.sensors import PANDASET_DOWNSTREAM

SCENE = "002"
TRAIN, VALIDATION = tuple(range(43)), tuple(range(48, 80))  # of those numbers the frames that are there
RATES = (4e-3, 1e-2, 2.5e-2)  # of supervised training
DISTILL_STEPS, RANDOM_STEPS, PROBE_STEPS, SUPERVISED_STEPS = 200, 20, 600, 300
GROUP, GAP = "pandaset", "gap"  # gap: the same models, trained on the Pandar64, on the PandarGT's points


def parts(seed: int, root: Path, folder: Path) -> Iterator[Part]:
    """Distil, probe, train with labels; all on the frames of `TRAIN`. Then the other sensor."""
    base = _load("pandaset_mini.py")
    base.seed, base.num_steps, base.checkpoint_every_steps = seed, DISTILL_STEPS, 50
    base.data.update(root=str(root), scenes=(SCENE,), frames=TRAIN)
    random = copy.deepcopy(base)
    random.num_steps = random.checkpoint_every_steps = RANDOM_STEPS
    random.optimizer.update(learning_rate=0.0, schedule="constant")  # its batch norms see the data, no more
    yield Part(GROUP, "distill_random", lambda: random)
    yield Part(GROUP, "distill", lambda: base)
    for start, name in (("random", "distill_random"), ("distilled", "distill")):
        probe = _segment(base, "probe")
        probe.checkpoint, probe.num_steps, probe.probe.features = str(folder / name), PROBE_STEPS, "cached"
        probe.optimizer.learning_rate = 2e-2
        probe.data.update(max_points=80_000, points_per_shard=81_920, scenes_per_shard=1)  # whole turns, as validated
        yield Part(GROUP, f"probe_{start}_100p", lambda probe=probe: probe)
    for rate in RATES:
        config = _segment(base, "finetune")
        config.num_steps, config.optimizer.learning_rate = SUPERVISED_STEPS, rate
        yield Part(GROUP, f"supervised_100p_{rate:g}", lambda config=config: config)
    trained = ["probe_random_100p", "probe_distilled_100p", *(f"supervised_100p_{rate:g}" for rate in RATES)]
    for name in trained:
        other = _segment(base, "evaluate")
        other.checkpoint = str(folder / name)
        other.data.update(split="validation", sensors=("pandargt",), points_per_shard=81_920, scenes_per_shard=1)
        yield Part(GAP, f"gap_{name}_pandargt", lambda other=other: other)


def _segment(base: Config, task: str) -> Config:
    config = copy.deepcopy(base)
    config.task, config.log_every_steps = task, 25
    config.data.update(sensors=("pandar64",), validation_frames=VALIDATION, augmentation="consistent")
    config.data.update(max_points=8_000, points_per_shard=24_576, scenes_per_shard=4)
    config.model.update(field_of_view=PANDASET_DOWNSTREAM.field_of_view, grids=PANDASET_DOWNSTREAM.grids)
    config.optimizer.weight_decay = 0.003
    return config


def main() -> None:
    parser = make_parser(__doc__ or "", (GROUP, GAP))
    parser.add_argument("--root", required=True, type=Path, help="the folder of PandaSet's scenes")
    arguments = parser.parse_args()
    folder = arguments.output.absolute() / f"seed_{arguments.seed}"
    run_all(arguments, folder, list(parts(arguments.seed, arguments.root.absolute(), folder)))


if __name__ == "__main__":
    sys.exit(main())
