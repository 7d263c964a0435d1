"""The published experiments as configs: what `configs/{pretrain,probe,finetune}` share. Figures are in those files.

Settings are those of the public code of ScaLR, ScaLR+, WaffleIron and VaViT. Epochs become steps: epochs x (training
frames // batch), the last incomplete batch of an epoch left out. Every step holds exactly the published batch
(`data.scenes_per_step`), whose capacities are set for one device; on D devices divide `data.points_per_shard`,
`scenes_per_shard`, `cells_per_shard`, `halo_per_shard` and `pillars_per_shard` by D (D must divide the batch).

The published loss is a mean over each GPU's points, then over GPUs. These configs follow one GPU, on which each point
weighs alike: `loss.scenes_per_group = 0`, and 172,175 updates (ScaLR's pretraining; 172,200 on eight GPUs). For n GPUs
set it to 8 / n: on eight each scene weighs alike. docs/parity.md says what that changes, docs/weights.md how a file
tells.

Published runs used mixed precision, ScaLR float16 and ScaLR+ bfloat16; here it is bfloat16 on accelerators.
"""

from __future__ import annotations

import math

from scalr_jax.config import Config, get_config
from scalr_jax.data.scenes import RAW_INTENSITY, WHOLE_VIEW
from scalr_jax.data.sensors import PANDARGT_FINETUNING, PANDASET_DOWNSTREAM, WAFFLEIRON
from scalr_jax.runtime.errors import InputError

# Frames to train on. Those of PandaSet are the pretraining's: labels exist for the same scenes.
TRAIN_FRAMES = {"nuscenes": 28_130, "semantic_kitti": 19_130, "pandar64": 3_920, "pandargt": 3_920}
MIXED = ("bicycle", "motorcycle", "other-vehicle", "person", "bicyclist")  # of SemanticKITTI
VAVITS = ("vavit_b", "vavit_l")  # with ScaLR+'s settings: no distillation into a VaViT is published
METHODS = ("scalr", "scalr_plus", *VAVITS)
VAVIT_CHANNELS = 768  # of a point; the published 128 are few to tell 1,024 features of a teacher from
BATCH_SIZE = 8
MAX_POINTS = 20_000
# Occupied and halo cells of a scene of 20,000 points, one camera's view or a whole turn: 1.2 times the most seen on
# frames of the four datasets (2026-11-22); a batch has room for eight such scenes.
VIEW_CELLS, VIEW_HALO = (3_000, 1_600, 1_600), (7_600, 2_700, 2_700)
# A pack of a device, its mean number of scenes and its share of points that are none of padding, of the four datasets
# in the published proportions (docs/measurements/loader.md).
PACK_POINTS, PACK_SCENES, PACK_LOOKAHEAD = 65_536, 10, 8
PACK_MEAN, PACK_FILL = 7.9, 0.96
PACK_CELLS, PACK_HALO = (13_312, 6_656, 6_656), (33_792, 14_336, 14_336)
# Of a MinkUNet with voxels of 0.1 m, by level; 62,555 points of eight of these scenes fill 85 % of them.
PACK_VOXELS, PACK_PAIRS = (64_512, 44_544, 23_552, 11_264, 4_864), (202_752, 226_304, 140_288, 77_312, 37_888)
# A scene of 20,000 points, likewise: 1.1 times the most seen on frames of the four datasets, as a run derives it.
SCENE_VOXELS, SCENE_PAIRS = (20_000, 14_464, 8_576, 4_864, 2_368), (138_368, 100_864, 61_568, 33_152, 17_536)
# Of a batch of 8 scenes, which has room for the largest: a step has 81,600 rows of 160,000 on average instead of all of
# them, filled to 77 % instead of 39 (a VaViT's 77,300, 84 %); 98 % fit the last one (60 real frames, 2026-11-29).
BUCKETS = (0.4, 0.5, 0.6)
TURN_CELLS, TURN_HALO = (5_200, 2_100, 2_600), (14_600, 4_300, 5_100)
# Pillars of 0.5 m: of a pack, which now and then is full of them before it is full of points, but costs fewer rows; of
# a turn of 20,000 points, 1.2 times the most seen (2026-11-29).
PACK_PILLARS, TURN_PILLARS = 9_216, 5_632
VAVIT_MEAN, VAVIT_FILL, PILLARS_A_POINT = 7.3, 0.90, 0.142
# Points of a whole scan after 0.1 m voxels: 1.5 times the most seen in mixed ones, 18,807 and 64,198 (2026-11-29).
SCAN_POINTS = {"nuscenes": 28_672, "semantic_kitti": 98_304}


def pretraining(method: str, channels: int = 768) -> Config:
    """Distillation on all four datasets jointly; `channels` of a WaffleIron: 256, 384 or 768."""
    config = _student(method, channels)
    config.task = "distill"
    config.data.dataset = "merged"
    config.loss.scenes_per_group = 0  # as on one GPU; 1: on eight
    _batch(config, BATCH_SIZE, VIEW_CELLS, VIEW_HALO)
    config.data.buckets = BUCKETS
    frames = sum(TRAIN_FRAMES.values())
    config.optimizer.update(learning_rate=2e-3, weight_decay=0.03)
    if method == "scalr":
        _epochs(config, 25, frames)
        config.data.update(image_size=(224, 448), antialias=False)  # torchvision 0.12
        config.teacher.position_interpolation = "dinov2"
        config.optimizer.update(schedule="cosine", warmup_share=3_500 / config.num_steps, final_learning_rate=1e-5)
    else:
        _epochs(config, 65, frames)
        config.data.update(image_size=(448, 896), antialias=True)
        config.teacher.position_interpolation = "antialias"  # timm's
        config.model.update(head_hidden=2048, drop_path=0.2)
        shares = {"warmup_share": 1 / 65, "timescale_share": 0.45 / 65, "cooldown_start_share": 63 / 65}
        config.optimizer.update(schedule="rsqrt", **shares)
    return config


def packed(config: Config, num_shards: int) -> Config:
    """The same pretraining with as many scenes a step as fit: the schedule, which counts scenes, stays the same."""
    scenes = config.num_steps * BATCH_SIZE
    config.optimizer.total_updates = config.num_steps
    vavit = config.model.name in VAVITS
    config.num_steps = math.ceil(scenes / ((VAVIT_MEAN if vavit else PACK_MEAN) * num_shards))
    config.data.update(scenes_per_step=0, buckets=(), points_per_shard=PACK_POINTS, scenes_per_shard=PACK_SCENES)
    config.data.lookahead = PACK_LOOKAHEAD
    if vavit:
        config.data.pillars_per_shard = (PACK_PILLARS,)
    else:
        config.data.update(cells_per_shard=PACK_CELLS, halo_per_shard=PACK_HALO)
    return config


def large_batch(config: Config, times: float) -> Config:
    """The optimiser for steps of `times` as many scenes, of which a run then has fewer: see docs/scaling.md.

    The learning rate grows with the square root of the batch, as suits Adam's normalised steps (Malladi et al., 2022),
    and the warm-up's share of the scenes likewise, up to a tenth. The schedule counts scenes and stays.
    """
    if times < 1:
        raise InputError(f"a batch cannot be {times} times as large; give a number from 1 on")
    config.optimizer.learning_rate *= math.sqrt(times)
    config.optimizer.warmup_share = min(0.1, config.optimizer.warmup_share * math.sqrt(times))
    return config


def probing(dataset: str, method: str) -> Config:
    """Batch norm and a linear layer on the frozen backbone of `config.checkpoint`."""
    config = _student(method)
    config.task, config.checkpoint = "probe", "CHECKPOINT"
    _dataset(config, dataset)
    if dataset.startswith("pandar") and method not in VAVITS:
        config.model.update(PANDASET_DOWNSTREAM._asdict())
    _batch(config, BATCH_SIZE, TURN_CELLS, TURN_HALO)
    _epochs(config, 50 if dataset.startswith("pandar") else 20, TRAIN_FRAMES[dataset], warmup=2)
    final = 1e-5 if method == "scalr" else 0.0
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.003, schedule="cosine", final_learning_rate=final)
    return config


def finetuning_share(dataset: str, argument: str) -> Config:
    """`finetuning` by what stands after a config file's colon: a method, a percentage, or both with a comma."""
    method, percent = "scalr", "100"
    for part in map(str.strip, argument.split(",")):
        method, percent = (method, part) if part.isdecimal() else (part, percent)
    if int(percent) < 1 or 100 % int(percent):
        raise InputError(f"{percent} % of the labels: give a share of 100/n %, as 1, 5, 10, 25 or 100")
    return finetuning(dataset, method, int(percent))


def finetuning(dataset: str, method: str, percent: int = 100) -> Config:
    """All parameters, from `config.checkpoint`, on `percent` of the labels; published are 100, 10 and 1."""
    config = _student(method)
    config.task, config.checkpoint = "finetune", "CHECKPOINT"  # to be given: from "" it would begin at random weights
    _dataset(config, dataset)
    if dataset.startswith("pandar") and method not in VAVITS:
        config.model.update((PANDARGT_FINETUNING if dataset == "pandargt" else PANDASET_DOWNSTREAM)._asdict())
    _batch(config, BATCH_SIZE, TURN_CELLS, TURN_HALO)
    config.data.label_fraction = percent / 100
    frames = -(-TRAIN_FRAMES[dataset] * percent // 100)
    short = dataset == "semantic_kitti" and method == "scalr"
    epochs, warmup = (45, 4) if percent < 100 else (10, 1) if short else (25, 2)
    _epochs(config, epochs, frames, warmup=warmup)
    config.model.drop_path = 0.2
    config.optimizer.update(weight_decay=0.0, schedule="cosine", final_learning_rate=0.0)
    if method == "scalr":
        config.optimizer.update(learning_rate=2e-3, layer_decay=0.99 if percent == 100 else 0.95)
    else:
        config.optimizer.update(learning_rate=1e-4, layer_decay=0.99)
    return config


def waffleiron(dataset: str, channels: int) -> Config:
    """The original WaffleIron with full supervision, from random weights; `config.checkpoint` stays empty."""
    config = get_config()
    config.task = "finetune"
    _dataset(config, dataset)
    config.model.update(WAFFLEIRON[dataset]._asdict())
    _batch(config, 4, TURN_CELLS, TURN_HALO)
    _epochs(config, 45, TRAIN_FRAMES[dataset], warmup=4, batch_size=4)
    config.model.update(channels=channels, norm="batch", activation="relu", drop_path=0.2, segmentation_head="linear")
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.003, schedule="cosine", final_learning_rate=1e-5)
    if dataset == "semantic_kitti":
        config.data.update(polarmix=MIXED, cutmix=MIXED, cutmix_ground=("road", "parking", "sidewalk"))
    return config


def vavit(dataset: str, drop_path: float) -> Config:
    """VaViT-B with full supervision, from random weights, on whole scans; `config.checkpoint` stays empty."""
    config = get_config()
    config.task = "finetune"
    _dataset(config, dataset)
    config.model.update(name="vavit_b", field_of_view=WHOLE_VIEW, drop_path=drop_path, segmentation_head="linear")
    _batch(config, BATCH_SIZE, (), ())
    points = SCAN_POINTS[dataset]
    config.data.update(max_points=points, points_per_shard=BATCH_SIZE * points, pillars_per_shard=())
    config.data.update(augmentation="vavit", pillarmix=7.5, intensity=RAW_INTENSITY)
    _epochs(config, 45, TRAIN_FRAMES[dataset], warmup=4)
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.003, schedule="cosine", final_learning_rate=0.0)
    if dataset == "semantic_kitti":
        config.data.update(cutmix=MIXED, cutmix_ground=("road", "parking", "sidewalk"))
    return config


def _student(method: str, channels: int = 768) -> Config:
    """The defaults with the method's student: 48 layers, layer norm, +-64 m, 256 cells; or a VaViT on all points."""
    if method not in METHODS:
        raise InputError(
            f"the method {method!r} is none of {', '.join(METHODS)}; give it after the file's name and a colon"
        )
    config = get_config()
    if method in VAVITS:
        config.model.update(name=method, field_of_view=WHOLE_VIEW)
        config.model.vavit.channels = VAVIT_CHANNELS
    else:
        config.model.update(channels=channels, activation="relu" if method == "scalr" else "gelu")
    return config


def _dataset(config: Config, dataset: str) -> None:
    if dataset.startswith("pandar"):
        config.data.update(dataset="pandaset", sensors=(dataset,))
    else:
        config.data.dataset = dataset


def _batch(config: Config, size: int, cells: tuple[int, ...], halo: tuple[int, ...]) -> None:
    """Exactly `size` scenes a step, with room for as many of the largest."""
    config.data.update(max_points=MAX_POINTS, scenes_per_step=size, scenes_per_shard=size, num_workers=12)
    config.data.points_per_shard = size * MAX_POINTS
    config.optimizer.batch_size = size
    if config.model.name in VAVITS:
        config.data.pillars_per_shard = (size * TURN_PILLARS,)
        return
    config.data.cells_per_shard, config.data.halo_per_shard = (
        tuple(size * n for n in table) for table in (cells, halo)
    )
    config.model.remat = "group"


def _epochs(config: Config, epochs: int, frames: int, *, warmup: int = 0, batch_size: int = BATCH_SIZE) -> None:
    """`num_steps` of so many epochs, and the share of them that warms up."""
    config.num_steps = epochs * (frames // batch_size)
    config.optimizer.warmup_share = warmup / epochs
    config.log_every_steps = 50
    config.checkpoint_every_steps = max(1, min(2_000, config.num_steps // 10))
