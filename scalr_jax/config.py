"""The one table of config keys: type, default, what is allowed, meaning, and whether a run may change it on resume.

A config file starts from `get_config()` and sets what differs; `settings.py` checks the whole config at once, before
data or devices are touched, and makes the frozen settings that travel through the code. `python -m scalr_jax.main
--help` and docs/config.md print the table. Keys that are shares (`warmup_share`, ...) are fractions of the whole
schedule, so that shortening a run keeps its shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from scalr_jax.runtime import keys
from scalr_jax.runtime.keys import key

TASKS = ("distill", "probe", "finetune", "evaluate", "robustness", "demo", "teacher")
DATASETS = ("streets", "pandaset", "pandar64", "pandargt", "nuscenes", "semantic_kitti", "folder")
MERGED = ("nuscenes", "semantic_kitti", "pandar64", "pandargt")  # what `data.dataset = "merged"` joins
SENSORS = ("beams32", "beams64", "solid", "pandar64", "pandargt")
AUGMENTATIONS = ("published", "vavit", "consistent", "none")
BACKBONES = ("waffleiron", "minkunet14", "minkunet18", "minkunet34")
BACKBONES += ("vavit_tiny", "vavit_s", "vavit_b", "vavit_l", "vavit_g")
CORRUPTIONS: tuple[str, ...] = ("fog", "wet_ground", "snow", "motion_blur", "beam_missing", "crosstalk")
CORRUPTIONS += ("incomplete_echo", "cross_sensor")
SEVERITIES = ("light", "moderate", "heavy")
FEATURES = ("augmented", "fixed", "cached")  # of a probe
NORMALIZATIONS = ("none", "center", "standardize", "phi_s")  # of a teacher's features
INTERPOLATIONS = ("auto", "dinov2", "size", "antialias", "radio", "naflex")
DTYPES = ("auto", "float32", "bfloat16")
USES = ("camera", "lidar", "radar", "map", "external")
TABLE: Any = {"low": 1, "high": 2**29, "resume": True}  # of sizes of tables
SHARES: dict = {"above": 0, "below": 1, "resume": True}
Config = Any  # a ConfigDict: its attributes have no static types
Point = tuple[float, float, float]
Grid = tuple[int, int]


@dataclass(frozen=True)
class RunSettings:
    """Keys at the top of a config."""

    task: str = key("distill", "what to do", choices=TASKS)
    seed: int = key(0, "of the data's order, of weights and of dropout", low=0, high=2**31 - 1)
    num_steps: int = key(1000, "steps of training", low=1, high=2**31 - 1)
    log_every_steps: int = key(10, "steps between two lines of metrics.jsonl", low=1, resume=True)
    checkpoint_every_steps: int = key(500, "steps between two checkpoints", low=1, resume=True)
    keep_checkpoints: int = key(2, "how many of the newest checkpoints are kept", low=1, resume=True)
    keep_every_steps: int = key(0, "besides these, one checkpoint every so many steps; 0: none", low=0, resume=True)
    deterministic: bool = key(False, "GPU: a training step gives the same bits every time (docs/internals/runs.md)")
    profile: tuple[int, ...] = key((), "(START, STOP): an XProf trace of these steps, in WORKDIR/profile", resume=True)
    wandb: str = key("", "project of Weights & Biases that gets the metrics too", resume=True)
    executable: str = key("", "the step as `scalr_jax.compile --save` compiled it", resume=True, local=True)
    checkpoint: str = key("", "probe, finetune, evaluate, robustness: a workdir or a published file to start from")
    teachers: tuple[dict, ...] = key((), "distill: several, each {key of teacher: value} (docs/teachers.md)")


@dataclass(frozen=True)
class DataSettings:
    """`config.data`: which scenes, what is done to them, and how they are packed."""

    dataset: str = key("streets", f"one of {', '.join(DATASETS)}; to distil also several joined by +, or merged")
    weights: tuple[float, ...] = key((), "proportions of several datasets' scenes; (): every frame once", above=0)
    root: str = key("", "the dataset's folder, or one that holds several; streets: their cache", local=True)
    sensors: tuple[str, ...] = key(("beams32",), "of streets or pandaset", choices=SENSORS)
    num_scenes: int = key(64, "streets: training scenes to render", low=1, high=10**6)
    num_validation_scenes: int = key(32, "streets: validation scenes to render", low=1, high=10**6)
    scenes: tuple[str, ...] = key((), "only these scenes; (): all")
    frames: tuple[int | str, ...] = key((), "only frames of these numbers; (): all", low=0)
    validation_frames: tuple[int | str, ...] = key((), "PandaSet: validate on these frames of the same scenes", low=0)
    split: str = key("train", "distill, evaluate: train, validation, test or all, as the dataset has them")
    frame_list: str = key("", "a text file that names the training frames, one a line")
    label_fraction: float = key(1.0, "probe, finetune: train on every n-th frame, 1/n", above=0, high=1)
    voxel_size: float = key(0.1, "metres: one point of each voxel is kept", low=0.001, high=100)
    intensity: tuple[float, ...] = key((), "(mean, deviation) of raw intensities; (): those of each sensor")
    max_points: int = key(20_000, "points of a scene: the nearest to a random one", low=1, high=2**24)
    cameras_per_scan: int = key(1, "distill: images of a scan, whose views are one scene; 0: all", low=0, high=64)
    pairs_per_point: int = key(
        1, "of several images: so many that see a point; their mean is its target", low=1, high=8
    )
    image_size: tuple[int, int] = key((224, 448), "rows, columns: whole patches", low=1, high=8192)
    antialias: bool = key(True, "False: resize images as torchvision 0.12 did, which ScaLR used")
    image_dtype: str = key("uint8", "of resized images; float32: not rounded", choices=("uint8", "float32"))
    scaled_decode: bool = key(False, "prepared records: decode JPEG at 1/2, 1/4 or 1/8 where that is large enough")
    augmentation: str = key("published", "how training scans are turned and scaled", choices=AUGMENTATIONS)
    polarmix: tuple[str, ...] = key((), "probe, finetune: swap half turns of scans, add these objects")
    cutmix: tuple[str, ...] = key((), "probe, finetune: add instances of these classes")
    cutmix_ground: tuple[str, ...] = key((), "the classes on whose points instances are put")
    pillarmix: float = key(0.0, "probe, finetune: metres of the pillars that three scans exchange; 0: none", low=0)
    points_per_shard: int = key(65_536, "points of a pack (of each device)", low=1, high=2**24)
    scenes_per_shard: int = key(10, "scenes of a pack, at most", low=1, high=2**16)
    scenes_per_step: int = key(0, "0: as many as fit; n (published: 8): exactly, over all devices", low=0, high=2**20)
    lookahead: int = key(1, "training: scenes that wait for room before a pack is closed; 4: fuller", low=1, high=64)
    cells_per_shard: tuple[int, ...] = key((), "occupied, a plane; (): from the first scenes", **TABLE)
    halo_per_shard: tuple[int, ...] = key((), "halo, a plane; (): likewise", **TABLE)
    voxels_per_shard: tuple[int, ...] = key((), "minkunet: voxels, a level; (): likewise", **TABLE)
    pairs_per_shard: tuple[int, ...] = key((), "minkunet: neighbours, a level; (): likewise", **TABLE)
    pillars_per_shard: tuple[int, ...] = key((), "vavit: occupied pillars, one number; (): likewise", **TABLE)
    buckets: tuple[float, ...] = key((), "smaller packs, as shares of these; a step takes the least", **SHARES)
    num_workers: int = key(2, "data workers of each process", low=0, high=1024, resume=True, local=True)
    prefetch: int = key(2, "packs made ahead", low=0, high=1024, resume=True, local=True)


@dataclass(frozen=True)
class MinkunetSettings:
    """`config.model.minkunet`."""

    voxel_size: float = key(0.1, "metres", above=0)
    width: float = key(1.0, "times the published channels, 32 to 256, of which a point gets 96", above=0, high=16)
    stem_convolutions: int = key(1, "1, or 2 as SPVNAS has", low=1, high=2)
    reading: str = key("nearest", "a point reads its voxel, or between voxels", choices=("nearest", "trilinear"))


@dataclass(frozen=True)
class VavitSettings:
    """`config.model.vavit`. 0: what `model.name` stands for (docs/internals/students.md)."""

    width: int = key(0, "channels of a pillar", low=0, high=16_384)
    depth: int = key(0, "blocks", low=0, high=1024)
    num_heads: int = key(0, "attention heads, each of a multiple of 4 channels", low=0, high=1024)
    hidden: int = key(0, "channels inside the MLP", low=0, high=65_536)
    point_hidden: int = key(0, "channels inside the point layers", low=0, high=16_384)
    point_depth: int = key(4, "point layers", low=1, high=64)
    merge_hidden: int = key(0, "of a point and of its pillar, where they are merged", low=0, high=16_384)
    channels: int = key(0, "features of a point, after the merge", low=0, high=16_384)
    pillar_size: float = key(0.5, "metres", low=0.05, high=100)
    padding_tokens: str = key("none", "published: scenes of a shard are filled up", choices=("none", "published"))


@dataclass(frozen=True)
class StudentSettings:
    """`config.model`. A MinkUNet uses name, field_of_view, heads, dtype and `minkunet`, and nothing else; a VaViT these
    with `vavit` for `minkunet`, and num_neighbors, drop_path, remat, residual_dtype."""

    name: str = key("waffleiron", "the backbone", choices=BACKBONES)
    channels: int = key(768, "features of a point", low=1, high=16_384)
    depth: int = key(48, "layers", low=1, high=1024)
    num_neighbors: int = key(16, "of each point, for the embedding", low=1, high=256)
    norm: str = key("layer", "layer as ScaLR, batch as WaffleIron", choices=("layer", "batch"))
    activation: str = key("relu", "relu as ScaLR, gelu as ScaLR+", choices=("relu", "gelu"))
    head_hidden: int = key(0, "hidden features of the distillation head; 0: linear; ScaLR+: 2048", low=0, high=65_536)
    segmentation_head: str = key("segment", "batch norm and linear, or linear alone", choices=("segment", "linear"))
    drop_path: float = key(0.0, "share of residual branches that are dropped in training", low=0, below=1)
    field_of_view: tuple[Point, Point] = key(
        ((-64.0, -64.0, -8.0), (64.0, 64.0, 8.0)), "lowest, highest corner, metres", low=-10_000.0, high=10_000.0
    )
    grids: tuple[Grid, Grid, Grid] = key(
        ((256, 256), (256, 32), (256, 32)), "rows, columns of xy, xz, yz", low=1, high=8192
    )
    implementation: str = key(
        "auto", "spatial mixing (docs/internals/students.md)", choices=("auto", "cells", "windows", "dense")
    )
    remat: str = key("none", "computed again in the backward pass, to save memory", choices=("none", "layer", "group"))
    dtype: str = key("auto", "auto: bfloat16, on a CPU float32", choices=DTYPES)
    residual_dtype: str = key("float32", "of the sum that layers add to", choices=("float32", "bfloat16"))
    minkunet: MinkunetSettings = dataclasses.field(default_factory=MinkunetSettings)
    vavit: VavitSettings = dataclasses.field(default_factory=VavitSettings)
    num_classes: int | None = key(None, "of the labels; None: the dataset's", low=1, high=255)


@dataclass(frozen=True)
class TeacherSettings:
    """`config.teacher`."""

    checkpoint: str = key("", "path or hf://OWNER/NAME of a ViT (docs/weights.md); demo: the small one of this package")
    cache: str = key("", "distill: a folder of its tokens (docs/tokens.md); no teacher runs", resume=True, local=True)
    feature: str = key("x_pre_norm", "tokens before or after the last norm", choices=("x_pre_norm", "x"))
    weight: float = key(1.0, "of its loss, beside those of other teachers", above=0)
    normalize: str = key("none", "features, by statistics of first scenes; docs/teachers.md", choices=NORMALIZATIONS)
    position_interpolation: str = key("auto", "auto: as the file's project", choices=INTERPOLATIONS)
    num_heads: int | None = key(None, "attention heads; None: of 64 channels each", low=1, high=1024)


@dataclass(frozen=True)
class LossSettings:
    """`config.loss`."""

    scenes_per_group: int = key(0, "mean over groups of n scenes, then over groups; 0: over all points", low=0)
    teacher_dropping: float = key(0.0, "share of steps without a teacher's loss, the largest excepted", low=0, below=1)


@dataclass(frozen=True)
class OptimizerSettings:
    """`config.optimizer`."""

    name: str = key("adamw", "lamb: for batches many times the published one", choices=("adamw", "lamb"))
    learning_rate: float = key(2e-3, "the highest; 0 with schedule constant trains batch norms' statistics only", low=0)
    final_learning_rate: float = key(1e-5, "cosine: at the end", low=0)
    weight_decay: float = key(0.03, "of all parameters", low=0)
    ema: float = key(0.0, "what a moving average of the weights keeps at each step, as 0.999; 0: none", low=0, below=1)
    layer_decay: float = key(1.0, "learning rate x layer_decay^(depth + 1 - layer)", above=0, high=1)
    beta1: float = key(0.9, "of Adam's first moment", low=0, below=1)
    beta2: float = key(0.999, "of Adam's second moment", low=0, below=1)
    schedule: str = key("cosine", "cosine as ScaLR, rsqrt as ScaLR+", choices=("cosine", "rsqrt", "constant"))
    warmup_share: float = key(0.02, "linear warm-up", low=0, high=1)
    cooldown_start_share: float = key(63 / 65, "rsqrt: where the cool-down begins", low=0, high=1)
    timescale_share: float = key(0.45 / 65, "rsqrt", above=0)
    batch_size: int = key(8, "the schedule's unit: progress = scenes seen / batch_size", low=1, high=2**20)
    total_updates: int = key(0, "schedule's length; 0: num_steps x expected scenes / batch_size", low=0, high=2**31 - 1)


@dataclass(frozen=True)
class ProbeSettings:
    """`config.probe`."""

    method: str = key("head", "trained, nearest neighbours, image prototypes", choices=("head", "knn", "zero_shot"))
    head: str = key("linear", "as published, or with a hidden layer", choices=("linear", "mlp"))
    features: str = key("augmented", "new scenes every epoch, the same, or cached", choices=FEATURES)
    cache_dtype: str = key("float32", "of cached features", choices=("float32", "float16"))
    bank_per_class: int = key(500, "knn: points of each class to compare with", low=1, high=10**6)
    num_neighbors: int = key(20, "knn", low=1, high=10**6)
    temperature: float = key(0.07, "knn: of a neighbour's vote exp(cosine / temperature)", above=0)
    prototypes: str = key("", "zero_shot: a folder of images by class; '': regions of the training images")
    inverse_regularization: float = key(1.0, "zero_shot: C of the logistic regression", above=0)


@dataclass(frozen=True)
class EvaluateSettings:
    """`config.evaluate`."""

    rings: tuple[float, ...] = key((10.0, 20.0, 30.0, 40.0, 50.0), "metres, ascending: results by distance", above=0)
    votes: int = key(1, "augmented copies of a scan that are averaged; 1: the scan itself", low=1, high=1000)
    submission: bool = key(False, "nuscenes, semantic_kitti: write the benchmark's files")
    submission_uses: tuple[str, ...] = key(
        ("lidar",), "the model's inputs, for nuScenes' submission.json", choices=USES
    )
    corruptions: tuple[str, ...] = key(CORRUPTIONS, "robustness: of Robo3D", choices=CORRUPTIONS)
    severities: tuple[str, ...] = key(SEVERITIES, "robustness", choices=SEVERITIES)
    corrupted_root: str = key("", "robustness: folder of the released nuScenes-C or SemanticKITTI-C; '': generated")
    baseline: str = key("auto", "of mCE: nuscenes_c, semantic_kitti_c, or the workdir of a robustness run")


@dataclass(frozen=True)
class MeshSettings:
    """`config.mesh`: axes of the device mesh."""

    data: int = key(-1, "-1: all devices / fsdp", low=-1)
    fsdp: int = key(1, "devices that share the parameters", low=1)


@dataclass(frozen=True)
class DemoSettings:
    """`config.demo`: the parts of task demo."""

    probe_steps: int = key(120, "steps of each linear probe", low=1, high=2**31 - 1)
    probe_learning_rate: float = key(0.02, "of the linear probes", above=0)
    supervised_learning_rates: tuple[float, ...] = key((8e-3, 1.5e-2, 2.5e-2), "the best one counts", above=0)
    segment_max_points: int = key(4_000, "data.max_points of probes and supervised training", low=1, high=2**24)
    segment_points_per_shard: int = key(8_192, "likewise", low=1, high=2**24)
    segment_scenes_per_shard: int = key(4, "likewise", low=1, high=2**16)


@dataclass(frozen=True)
class DemoVitSettings:
    """`config.teacher_training.vit`."""

    patch_size: int = key(8, "pixels", low=1, high=256)
    width: int = key(128, "channels", low=1, high=8192)
    depth: int = key(4, "blocks", low=1, high=256)
    num_heads: int = key(4, "attention heads", low=1, high=1024)
    hidden: int = key(512, "channels inside the MLP", low=1, high=65_536)
    layer_scale: bool = key(False, "whether branches are scaled")
    position_grid: tuple[int, int] = key((14, 28), "rows and columns of the position table", low=1, high=1024)


@dataclass(frozen=True)
class DemoLossSettings:
    """`config.teacher_training.weights` of the losses."""

    length: float = key(1.0, "of an object", low=0)
    width: float = key(1.0, "of an object", low=0)
    tallness: float = key(1.0, "of an object", low=0)
    height: float = key(0.5, "above the ground", low=0)
    depth: float = key(0.2, "from the camera", low=0)
    normal: float = key(1.0, "of the surface", low=0)
    albedo: float = key(0.5, "of the surface", low=0)
    offset: float = key(0.2, "to the object's centre", low=0)
    mean: float = key(2.0, "of the unit features, squared", low=0)
    correlation: float = key(1.0, "between channels, squared", low=0)


@dataclass(frozen=True)
class TeacherTrainingSettings:
    """`config.teacher_training`: how task teacher trains the packaged ViT."""

    num_pixels: int = key(768, "with targets, in each image", low=1, high=2**20)
    max_gradient: float = key(2.0, "norm at which gradients are clipped", above=0)
    vit: DemoVitSettings = dataclasses.field(default_factory=DemoVitSettings)
    weights: DemoLossSettings = dataclasses.field(default_factory=DemoLossSettings)


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training, beside student, teacher and scenes."""

    run: RunSettings
    data: DataSettings
    optimizer: OptimizerSettings
    mesh: MeshSettings


@dataclass(frozen=True)
class Settings:
    """A whole config, checked. Only tasks.py and the commands hold one; its parts travel."""

    run: RunSettings
    data: DataSettings
    model: StudentSettings
    teacher: TeacherSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    probe: ProbeSettings
    evaluate: EvaluateSettings
    mesh: MeshSettings
    demo: DemoSettings
    teacher_training: TeacherTrainingSettings

    @property
    def teachers(self) -> tuple[TeacherSettings, ...]:
        """All to distil from: `config.teachers`, else `config.teacher`."""
        return read_teachers(self.run.teachers, self.teacher, []) or (self.teacher,)

    @property
    def training(self) -> TrainSettings:
        return TrainSettings(self.run, self.data, self.optimizer, self.mesh)


def read_teachers(
    given: Sequence[Mapping[str, object]], teacher: TeacherSettings, problems: list[str]
) -> tuple[TeacherSettings, ...]:
    """`config.teachers`; what one does not say is as in `teacher`, but for its checkpoint and cache."""
    shared = {**dataclasses.asdict(teacher), "checkpoint": "", "cache": ""}
    parts = (({**shared, **each}, f"teachers[{k}].") for k, each in enumerate(given))
    return tuple(keys.read(TeacherSettings, values, problems, prefix) for values, prefix in parts)


SECTIONS: dict[str, type] = {name: table for name, table in get_type_hints(Settings).items() if name != "run"}


def get_config() -> Config:
    """The defaults: ScaLR's 48 x 768 student, 8 scenes a step. Locked: a misspelt key names the nearest one."""
    from ml_collections import ConfigDict

    nested = keys.defaults(RunSettings) | {name: keys.defaults(table) for name, table in SECTIONS.items()}
    return ConfigDict(nested, convert_dict=True).lock()


def all_keys() -> list[keys.Row]:
    """Every key, in the order of the table."""
    sections = (keys.rows(table, f"{name}.") for name, table in SECTIONS.items())
    return [*keys.rows(RunSettings), *(row for section in sections for row in section)]


if __name__ == "__main__":
    print(keys.markdown({"": RunSettings, **SECTIONS}), end="")
