"""`scalr_jax.main` on workdirs, checkpoints, results and datasets that are damaged, or of something else."""

import json

import pytest

from scalr_jax.settings import read_settings, record_of
from tests.support import damages, hostile
from tests.support.hostile import Row
from tests.support.runs import config_of

SMOKE = (
    "--config=CONFIGS/smoke.py",
    "--config.data.root=THINGS/streets",
    "--config.data.num_scenes=4",
    "--config.data.num_validation_scenes=2",
)
TINY = ("--config.model.channels=8", "--config.model.depth=1", "--config.data.image_size=(112,224)")
OWNED = (SMOKE[0], "--config.data.root=streets", *SMOKE[2:])
VIEW = "((256,256),(256,32),(256,32))"
PROBE = (*SMOKE, *TINY, f"--config.model.grids={VIEW}", "--config.task=probe", "--config.checkpoint=run", "--workdir=w")


def begun(folder):
    """A workdir run/ whose config is that of the command."""
    config = config_of("smoke")
    config.data.update(num_scenes=4, num_validation_scenes=2, root="streets")
    (folder / "run").mkdir()
    record = record_of(read_settings(config))
    (folder / "run" / "config.json").write_text(json.dumps(record))
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n' * 3)


def then(*steps):
    return lambda folder: [step(folder) for step in steps]


OWN = [  # the workdir of the run itself
    *(
        Row(f"own config.json: {name}", (*OWNED, "--workdir=run"), ("run/config.json",), damage=then(begun, damage))
        for name, damage in damages.every_way("run/config.json").items()
        if name not in ("other keys", "gone")
    ),
    Row(
        "own: gone",
        (*OWNED, "--workdir=run"),
        ("run", "config.json", "--workdir"),
        damage=then(begun, damages.gone("run/config.json")),
    ),
    Row(
        "own: another's config.json",
        (*OWNED, "--workdir=run"),
        ("run", "another config", "--workdir"),
        damage=then(begun, damages.written("run/config.json", '{"key": 1}')),
    ),
    Row(
        "own: another seed",
        (*OWNED, "--config.seed=5", "--workdir=run"),
        ("seed: 0 saved, 5 now", "--workdir"),
        damage=begun,
    ),
    *(
        Row(
            f"own config.json: {key} is {value!r}",
            (*OWNED, "--workdir=run"),
            (key.replace("__", "."), "run"),
            damage=then(begun, damages.keys("run/config.json", **{key: value})),
        )
        for key, value in (("seed", "x"), ("data__voxel_size", None), ("model", 3), ("data", []), ("model__depth", [4]))
    ),
    *(
        Row(
            f"own metrics.jsonl: {name}",
            (*OWNED, "--workdir=run"),
            ("run/metrics.jsonl", "line 2"),
            damage=then(begun, damages.written("run/metrics.jsonl", text)),
        )
        for name, text in {
            "a number": '{"step": 1}\n3\n{"step": 2}\n',
            "a list": '{"step": 1}\n[1]\n{"step": 2}\n',
            "null": '{"step": 1}\nnull\n{"step": 2}\n',
            "text": '{"step": 1}\n"x"\n{"step": 2}\n',
            "no JSON in the middle": '{"step": 1}\n{"st\n{"step": 2}\n',
            "a step of text": '{"step": 1}\n{"step": "two"}\n{"step": 2}\n',
            "a step of a list": '{"step": 1}\n{"step": [2]}\n',
            "two on a line": '{"step": 1}\n{"step": 2}{"step": 3}\n{"step": 4}\n',
            "deep": '{"step": 1}\n' + "[" * 100_000 + '\n{"step": 2}\n',
        }.items()
    ),
    Row(
        "own metrics.jsonl: not UTF-8",
        (*OWNED, "--workdir=run"),
        ("run/metrics.jsonl",),
        damage=then(begun, damages.written("run/metrics.jsonl", b'{"step": 1}\n\xff\n{}\n')),
    ),
    Row(
        "own metrics.jsonl: a folder",
        (*OWNED, "--workdir=run"),
        ("run/metrics.jsonl",),
        damage=then(begun, damages.folder_there("run/metrics.jsonl")),
    ),
    Row(
        "own: a file",
        (*OWNED, "--workdir=run"),
        ("run is a file", "--workdir"),
        damage=lambda folder: (folder / "run").write_text(""),
    ),
    Row(
        "own: below a file",
        (*OWNED, "--workdir=run/w"),
        ("run",),
        damage=lambda folder: (folder / "run").write_text(""),
    ),
    Row(
        "own: a link to itself",
        (*OWNED, "--workdir=run"),
        ("run",),
        damage=lambda folder: (folder / "run").symlink_to("run"),
    ),
    Row("own: a name too long", (*OWNED, f"--workdir={'x' * 300}"), ("xxx",)),
    Row(
        "own: checkpoints is a file",
        (*OWNED, "--workdir=run"),
        ("run/checkpoints",),
        damage=then(begun, lambda folder: (folder / "run/checkpoints").write_text("")),
    ),
    Row(
        "own: the lock is a folder",
        (*OWNED, "--workdir=run"),
        ("run/lock",),
        damage=then(begun, lambda folder: (folder / "run/lock").mkdir()),
    ),
]

START = [  # the workdir that config.checkpoint names
    *(
        Row(f"checkpoint settings.json: {name}", PROBE, ("run/settings.json",), uses=("run",), damage=damage)
        for name, damage in damages.every_way("run/settings.json").items()
    ),
    *(
        Row(
            f"checkpoint settings.json: without {key}",
            PROBE,
            ("run/settings.json", key),
            uses=("run",),
            damage=damages.keys("run/settings.json", **{key: ...}),
        )
        for key in ("name", "head", "out_features", "voxel_size", "intensities")
    ),
    *(
        Row(
            f"checkpoint settings.json: {key} = {value!r}",
            PROBE,
            ("run/settings.json",),
            uses=("run",),
            damage=damages.keys("run/settings.json", **{key: value}),
        )
        for key, value in (("channels", 16), ("channels", "8"), ("depth", 4), ("norm", "batch"))
    ),
    *(
        Row(f"checkpoint config.json: {name}", PROBE, ("run/config.json",), uses=("run",), damage=damage)
        for name, damage in damages.every_way("run/config.json").items()
        if name != "gone"
    ),
    Row("checkpoint: no weights", PROBE, ("run",), uses=("run",), damage=damages.gone("run/checkpoints")),
    Row("checkpoint: no step", PROBE, ("run/checkpoints",), uses=("run",), damage=damages.gone("run/checkpoints/1")),
    Row(
        "checkpoint: a flipped bit",
        PROBE,
        ("run/checkpoints", "step 1", "copy the workdir again"),
        uses=("run",),
        damage=damages.flipped("run/checkpoints/1/**/d/*"),
    ),
    Row(
        "checkpoint: a cut file",
        PROBE,
        ("run/checkpoints", "step 1", "copy the workdir again"),
        uses=("run",),
        damage=damages.cut("run/checkpoints/1/state/_METADATA"),
    ),
    Row(
        "checkpoint: no metadata",
        PROBE,
        ("run/checkpoints", "step 1", "copy the workdir again"),
        uses=("run",),
        damage=damages.gone("run/checkpoints/1/state/_METADATA"),
    ),
    Row(
        "checkpoint: an export that is a program",
        PROBE,
        ("run", "config.checkpoint"),
        uses=("export",),
        damage=then(
            lambda f: (f / "export").rename(f / "run"), damages.keys("run/config.json", settings__format="onnx")
        ),
    ),
    Row(
        "checkpoint: zero_shot without a head",
        (*PROBE, "--config.probe.method=zero_shot"),
        ("run", "distillation head"),
        uses=("run",),
    ),
    *(
        Row(
            f"checkpoint of zero_shot, config.json: {name}",
            (*PROBE[:-2], "--config.checkpoint=pretrain", "--config.probe.method=zero_shot", "--workdir=w"),
            words,
            uses=("pretrain",),
            damage=damage,
        )
        for name, damage, words in (
            ("teacher of text", damages.keys("pretrain/config.json", teacher="demo"), ("pretrain/config.json",)),
            ("without teacher", damages.keys("pretrain/config.json", teacher=...), ("pretrain/config.json",)),
        )
    ),
]

EVALUATE = (
    "--config=CONFIGS/evaluate.py:run",
    "--config.data.root=THINGS/streets",
    "--config.data.num_validation_scenes=2",
    "--config.data.image_size=(112,224)",
    "--workdir=w",
)

EVALUATIONS = [
    *(
        Row(f"evaluate config.json: {name}", EVALUATE, ("run/config.json", "WORKDIR"), uses=("run",), damage=damage)
        for name, damage in damages.every_way("run/config.json").items()
    ),
    *(
        Row(
            f"evaluate config.json: {key} is {value!r}",
            EVALUATE,
            words,
            uses=("run",),
            damage=damages.keys("run/config.json", **{key: value}),
        )
        for key, value, words in (
            ("seed", "x", ("seed",)),
            ("data", 3, ("run/config.json",)),
            ("model", [], ("run/config.json",)),
            ("data__voxel_size", "x", ("voxel_size",)),
            ("model__grids", 3, ("grids",)),
            ("model__minkunet", 3, ("run/config.json",)),
            ("data__sensors", ["beams33"], ("data.sensors",)),
        )
    ),
    Row(
        "evaluate: other classes",
        EVALUATE,
        ("run", "classes"),
        uses=("run",),
        damage=damages.keys("run/settings.json", class_names=["a"] * 7),
    ),
    Row(
        "evaluate: a distilled run",
        (EVALUATE[0].replace("run", "pretrain"), *EVALUATE[1:]),
        ("pretrain", "segmentation head"),
        uses=("pretrain",),
    ),
    *(
        Row(
            f"robustness baseline: {name}",
            (*EVALUATE, "--config.task=robustness", "--config.evaluate.baseline=base/results.json"),
            ("base/results.json",),
            uses=("run",),
            damage=then(lambda f: (f / "base").mkdir(), damages.written("base/results.json", "{}"), damage),
        )
        for name, damage in damages.every_way("base/results.json").items()
    ),
    Row(
        "robustness baseline: not there",
        (*EVALUATE, "--config.task=robustness", "--config.evaluate.baseline=none"),
        ("evaluate.baseline", "none"),
        uses=("run",),
    ),
    Row(
        "robustness: a released set that is not there",
        (*EVALUATE, "--config.task=robustness", "--config.evaluate.corrupted_root=none"),
        ("none",),
        uses=("run",),
    ),
    Row(
        "evaluate: a submission of streets",
        (*EVALUATE, "--config.evaluate.submission=True"),
        ("submission",),
        uses=("run",),
    ),
]


@pytest.mark.parametrize("row", hostile.rows_of(OWN, START, EVALUATIONS, fast=4))
def test_the_law(row, things, tmp_path, capfd):
    hostile.check(row, hostile.run("main", row, things, tmp_path, capfd))
