"""`scalr_jax.main` and its config: flags, config files that raise, return or hold something else, keys, sizes."""

import pytest

from tests.support import hostile
from tests.support.hostile import Row

SMOKE = ("--config=CONFIGS/smoke.py", "--config.data.root=THINGS/streets", "--config.data.num_scenes=4", "--workdir=w")


def flags(name, *words, add=(), base=SMOKE):
    """A row of wrong flags."""
    return Row(f"flags: {name}", (*base, *add), words)


FLAGS = [
    flags("none", "--config and --workdir are required", "--config=configs/demo.py", base=()),
    flags("no workdir", "--workdir", "required", base=SMOKE[:1]),
    flags("no config", "--config", "required", base=SMOKE[3:]),
    flags("empty workdir", "--workdir", "required", base=(SMOKE[0], "--workdir=")),
    flags("blank workdir", "--workdir", base=(SMOKE[0], "--workdir= ")),
    flags("empty config", "--config=", "give a config file", base=("--config=", SMOKE[3])),
    flags(
        "config not there",
        "configs/none.py does not exist",
        "give a config file",
        base=("--config=configs/none.py", SMOKE[3]),
    ),
    flags("unknown", "no_such_flag", add=("--no_such_flag=1",)),
    flags("surplus", "unexpected arguments: again", add=("again",)),
    flags("misspelt key", "num_workers", add=("--config.data.nun_workers=2",)),
    flags("key of no section", "dats", add=("--config.dats.root=x",)),
    flags("section as a value", "data", add=("--config.data=3",)),
    flags("text for a number", "num_steps", add=("--config.num_steps=many",)),
    flags("half a tuple", "image_size", add=("--config.data.image_size=(1,",)),
    flags("code for a tuple", "image_size", add=("--config.data.image_size=__import__('os').getpid()",)),
    flags("profile of text", "--profile=soon", "100:110", add=("--profile=soon",)),
    flags("profile that ends before it begins", "profile = (5, 3)", add=("--profile=5:3",)),
    flags("negative connect_seconds", "--connect_seconds=-1", add=("--connect_seconds=-1",)),
    flags("connect_seconds 0", "--connect_seconds=0", add=("--connect_seconds=0",)),
    flags("endless connect_seconds", "--connect_seconds=9999999999", add=("--connect_seconds=9999999999",)),
    flags("connect_seconds of text", "connect_seconds", add=("--connect_seconds=soon",)),
    flags("address alone", "--num_processes and --process_id must be given too", add=("--coordinator_address=a:1",)),
    flags("number alone", "--coordinator_address and --process_id", add=("--num_processes=2",)),
    flags(
        "process beyond",
        "--process_id=2",
        "--num_processes=2",
        add=("--coordinator_address=localhost:1", "--num_processes=2", "--process_id=2"),
    ),
    flags(
        "negative process",
        "--process_id=-1",
        add=("--coordinator_address=localhost:1", "--num_processes=2", "--process_id=-1"),
    ),
    flags(
        "no process",
        "--num_processes=0",
        add=("--coordinator_address=localhost:1", "--num_processes=0", "--process_id=0"),
    ),
    flags(
        "address without port",
        "--coordinator_address=localhost",
        "host:port",
        add=("--coordinator_address=localhost", "--num_processes=2", "--process_id=1"),
    ),
    flags(
        "port beyond",
        "--coordinator_address=localhost:99999",
        "host:port",
        add=("--coordinator_address=localhost:99999", "--num_processes=2", "--process_id=1", "--connect_seconds=1"),
    ),
    flags(
        "port zero",
        "--coordinator_address=localhost:0",
        "host:port",
        add=("--coordinator_address=localhost:0", "--num_processes=2", "--process_id=1", "--connect_seconds=1"),
    ),
    flags(
        "host that cannot be",
        "localhost..:1",
        "not reached",
        add=("--coordinator_address=localhost..:1", "--num_processes=2", "--process_id=1", "--connect_seconds=1"),
    ),
]


def file(name, text, *words, argument=""):
    """A row of a config file that holds something else."""
    data = text if isinstance(text, bytes) else text.encode()
    arguments = (f"--config=bad.py{argument}", "--workdir=w")
    words = words[1:] if words[:1] == ("config:",) else ("bad.py", *words)
    return Row(f"file: {name}", arguments, words, damage=lambda folder: (folder / "bad.py").write_bytes(data))


def raising(what):
    return f"def get_config():\n    raise {what}\n"


def returning(what):
    return f"from scalr_jax.config import get_config as make\ndef get_config():\n    config = make()\n    {what}\n"


def with_key(key, value):
    """A config in which a key, or a section, is something else."""
    *sections, last = key.split(".")
    part = ".".join(["config", *sections])
    return returning(f"{part}.unlock(); del {part}['{last}']; {part}.{last} = {value}; return config")


FILES = [
    *(
        file(f"raises {what}", raising(what), what.split("(")[0])
        for what in (
            "RuntimeError('no')",
            "ZeroDivisionError('by zero')",
            "RecursionError",
            "MemoryError",
            "SystemExit(0)",
            "SystemExit('bye')",
            "AssertionError",
            "StopIteration",
            "GeneratorExit",
            "NotImplementedError",
            "UnicodeDecodeError('a', b'', 0, 1, 'x')",
            "KeyError('x')",
            "AttributeError('x')",
            "TypeError('x')",
            "ValueError('x')",
            "OSError('x')",
            "FileNotFoundError(2, 'No such file', 'x')",
            "Exception('two\\nlines')",
            "BaseException('x')",
            "BufferError",
            "EOFError",
        )
    ),
    file(
        "raises an error of ours",
        "from scalr_jax.runtime.errors import InputError\n" + raising("InputError('bad.py: key = 3')"),
        "key = 3",
    ),
    file(
        "raises an error without words",
        "class Odd(Exception):\n    def __str__(self):\n        return 1/0\n" + raising("Odd"),
        "Odd",
    ),
    file("raises a long text", raising("ValueError('x' * 5000)"), "ValueError"),
    file("leaves while it is read", "import sys\nsys.exit()\n", "SystemExit"),
    file("leaves with 0", "import sys\nsys.exit(0)\n", "SystemExit"),
    file("fails while it is read", "1 / 0\n", "ZeroDivisionError"),
    file("imports what is not there", "import no_such_package\n", "no_such_package"),
    file("imports a name that is not there", "from scalr_jax.config import nothing\n", "nothing"),
    file("syntax", "def get_config(:\n", "line 1"),
    file("indentation", "def get_config():\nreturn 1\n", "line 2"),
    file("tabs and blanks", "def get_config():\n\tif 1:\n        return 2\n"),
    file("no name", "get_config = get_konfig\n", "get_konfig"),
    file("NUL", "a = 1\0\n"),
    file("not UTF-8", b"# \xff\xfe\nx = 1\n"),
    file("binary", bytes(range(256))),
    file("empty", "", "get_config"),
    file("no get_config", "x = 1\n", "get_config"),
    file("get_config is no function", "get_config = 3\n", "not callable"),
    file("get_config takes two", "def get_config(a, b):\n    pass\n", "get_config"),
    file("takes no argument", "from scalr_jax.config import get_config\n", argument=":more"),
    *(
        file(f"returns {what}", f"def get_config():\n    return {what}\n", "get_config")
        for what in (
            "None",
            "3",
            "{}",
            "[]",
            "'text'",
            "get_config",
            "object()",
            "(x for x in ())",
            "{'task': 'distill'}",
        )
    ),
    file(
        "returns no keys",
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n",
        "config:",
        "is missing",
    ),
    file("a section is missing", returning("config.unlock(); del config['data']; return config"), "config:", "data"),
    file("a section is a number", with_key("model", "3"), "config:", "model"),
    file("a section is a list", with_key("mesh", "[1]"), "config:", "mesh"),
    file("a part of a section is text", with_key("model.minkunet", "'x'"), "config:", "minkunet"),
    file(
        "a key is missing",
        returning("config.unlock(); del config['seed']; return config"),
        "config:",
        "seed is missing",
    ),
    file(
        "a key too many", returning("config.unlock(); config.sead = 1; return config"), "config:", "sead is not a key"
    ),
    file(
        "a key that is no text",
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({1: 2})\n",
        "config:",
        "data is missing",
    ),
    file("a value that is a function", with_key("seed", "len"), "config:", "seed"),
    file("a value that is an array", "import numpy as np\n" + with_key("seed", "np.ones(3)"), "config:", "seed"),
    file(
        "a reference that fails",
        "from ml_collections import FieldReference as F\n" + returning("config.seed = F(1) // F(0); return config"),
        "ZeroDivisionError",
    ),
    file("a reference to itself", returning("config.seed = config.get_ref('seed'); return config"), "cycle"),
    Row(
        "file: a folder",
        ("--config=bad.py", "--workdir=w"),
        ("bad.py",),
        damage=lambda folder: (folder / "bad.py").mkdir(),
    ),
    Row(
        "file: JSON",
        ("--config=bad.json", "--workdir=w"),
        ("bad.json",),
        damage=lambda folder: (folder / "bad.json").write_text("{}"),
    ),
    Row(
        "file: a link to itself",
        ("--config=bad.py", "--workdir=w"),
        ("bad.py",),
        damage=lambda folder: (folder / "bad.py").symlink_to("bad.py"),
    ),
    Row(
        "file: of a workdir that is not there",
        ("--config=CONFIGS/evaluate.py:none", "--workdir=w"),
        ("none/config.json", "WORKDIR"),
    ),
    Row("file: of no workdir", ("--config=CONFIGS/evaluate.py", "--workdir=w"), ("config.json", "WORKDIR")),
    Row(
        "file: of an argument that it does not know",
        ("--config=CONFIGS/probe/nuscenes.py:best", "--workdir=w"),
        ("best",),
    ),
    Row(
        "file: of a method that is none",
        ("--config=CONFIGS/pretrain/scalr_packed_wi48_768.py:many", "--workdir=w"),
        ("many",),
    ),
]


def keys(text, *words):
    """A row of wrong keys: `text` as on the command line, without --config."""
    given = tuple(f"--config.{part}" for part in text.split(" ; "))
    return Row(f"key: {text}", (*SMOKE, *given), words or (given[0].removeprefix("--config.").split("=")[0],))


KEYS = [
    keys("task=distil", "task", "distil", "finetune"),
    keys("seed=-1"),
    keys("seed=3000000000"),
    keys("num_steps=0"),
    keys("num_steps=10.5"),
    keys("log_every_steps=0"),
    keys("keep_checkpoints=0"),
    keys("data.augmentation=nope"),
    keys("data.dataset=nuscenes+waymo", "data.dataset", "waymo"),
    keys("data.intensity=('a','b')"),
    keys("data.label_fraction=0.0"),
    keys("data.cutmix_ground=('road',)"),
    keys("model.drop_path=-0.5"),
    keys("model.field_of_view=((1e9,0.0,0.0),(2e9,1.0,1.0))"),
    keys("optimizer.layer_decay=0.0"),
    keys("optimizer.beta2=1.0"),
    keys("evaluate.rings=(0.0,)"),
    keys("evaluate.votes=2 ; data.augmentation=none", "evaluate.votes", "data.augmentation"),
    keys("num_steps=9999999999"),
    keys("data.dataset=kitty", "data.dataset", "streets, pandaset"),
    keys("data.dataset=", "data.dataset"),
    keys("data.dataset=nuscenes+", "data.dataset"),
    keys("data.sensors=('beams33',)"),
    keys("data.sensors=()", "sensors", "beams32, beams64, solid"),
    keys("data.split=val", "split", "val"),
    keys("data.frames=('4x',)"),
    keys("data.frames=(-1,)"),
    keys(
        "data.scenes=('nowhere',) ; data.dataset=pandaset ; data.sensors=('pandar64',) ; data.root=THINGS/pandaset",
        "nowhere",
        "001",
    ),
    keys("data.dataset=pandaset ; data.root=THINGS/pandaset", "data.sensors", "pandar64, pandargt"),
    keys("data.root=/no/such ; data.dataset=pandaset", "/no/such is not a folder"),
    keys("data.root=/dev/null ; data.dataset=pandaset", "/dev/null is not a folder"),
    keys("data.root=/proc/1/no", "/proc/1/no"),
    keys("data.dataset=nuscenes ; data.root=", "data.root is empty"),
    keys("data.dataset=nuscenes", "v1.0-mini: no such folder"),
    keys("data.frame_list=none.txt", "none.txt"),
    keys("data.label_fraction=0.3"),
    keys("data.label_fraction=0.1", "task"),
    keys("data.weights=(1.0,2.0)"),
    keys("data.weights=(0.0,)"),
    keys("data.intensity=(1.0,)"),
    keys("data.intensity=(0.0,0.0)"),
    keys("data.voxel_size=0.0"),
    keys("data.voxel_size=-1.0"),
    keys("data.voxel_size=nan"),
    keys("data.voxel_size=1e-30"),
    keys("data.image_size=(100,225)", "data.image_size", "patch"),
    keys("data.image_size=(0,224)"),
    keys("data.image_size=(112,)"),
    keys("data.image_size=(112.5,224)"),
    keys("data.cutmix=('car',)"),
    keys("data.validation_frames=(1,)"),
    keys("data.points_per_shard=100", "data.points_per_shard is 100"),
    keys("data.scenes_per_step=3", "does not divide"),
    keys("data.cells_per_shard=(8,)"),
    keys("data.num_workers=-1"),
    keys("data.num_workers=100000"),
    keys("data.prefetch=-1"),
    keys("wandb=lidar", "wandb = 'lidar'"),
    keys("model.name=resnet"),
    keys("model.activation=swish", "relu, gelu"),
    keys("model.norm=group"),
    keys("model.depth=0"),
    keys("model.channels=0"),
    keys("model.num_neighbors=0"),
    keys("model.drop_path=1.0"),
    keys("model.grids=((8,8),)"),
    keys("model.grids=((0,8),(8,8),(8,8))"),
    keys("model.field_of_view=((1.0,0.0,0.0),(-1.0,1.0,1.0))"),
    keys("model.field_of_view=((0.0,0.0,0.0),(1.0,1.0))"),
    keys("model.field_of_view=((1000.0,1000.0,1000.0),(1001.0,1001.0,1001.0))", "field of view"),
    keys("model.dtype=float16"),
    keys("model.minkunet.stem_convolutions=3"),
    keys("model.name=minkunet34 ; model.minkunet.voxel_size=0.00001", "model.minkunet.voxel_size"),
    keys("model.name=vavit_tiny ; model.vavit.num_heads=5", "model.vavit.num_heads = 5", "model.vavit.width = 48"),
    keys("model.name=vavit_tiny ; model.vavit.width=66", "model.vavit.num_heads = 3", "model.vavit.width = 66", "22"),
    keys("model.name=vavit_tiny ; model.vavit.pillar_size=0.0", "model.vavit.pillar_size"),
    keys("model.name=vavit_tiny ; data.pillars_per_shard=(8,)", "data.pillars_per_shard is (8,)"),
    keys("model.name=vavit_tiny ; data.pillars_per_shard=(8,8)", "data.pillars_per_shard = (8, 8)"),
    keys("executable=a ; data.buckets=(0.5,)", "executable", "data.buckets = (0.5,)"),
    keys("executable=nowhere", "nowhere", "config.executable"),
    keys("data.augmentation=vavit", "data.augmentation", "image"),
    keys("data.pillarmix=-1.0"),
    keys("data.pillarmix=0.01"),
    keys("model.num_classes=0"),
    keys("teacher.checkpoint=", "teacher.checkpoint"),
    keys("teacher.checkpoint=vit.pth", "dinov2_vitl14_pretrain.pth"),
    keys("teacher.checkpoint=/dev/null", "/dev/null"),
    keys("teacher.checkpoint=THINGS", "THINGS"),
    keys("teacher.num_heads=7"),
    keys("teacher.cache=none", "none holds no finished token cache"),
    keys("teacher.cache=THINGS/folder", "folder holds no finished token cache"),
    keys("teacher.cache=THINGS/scan.bin", "scan.bin holds no finished token cache"),
    keys("teacher.feature=last"),
    keys("teacher.normalize=whiten", "none, center, standardize, phi_s"),
    keys("teachers=({'checkpoint': 'a.pth', 'weigth': 2},)", "teachers[0].weigth is not a key"),
    keys("teachers=({'checkpoint': 'a.pth'}, {'checkpoint': 'demo'})", "teacher.checkpoint", "teachers alone"),
    keys("teachers=({'checkpoint': 'a.pth'}, 3)", "teachers"),
    keys("loss.teacher_dropping=0.5", "loss.teacher_dropping", "one teacher"),
    keys("optimizer.name=sgd"),
    keys("optimizer.learning_rate=inf"),
    keys("optimizer.learning_rate=-0.1"),
    keys("optimizer.learning_rate=0.0"),
    keys("optimizer.ema=1.0"),
    keys("optimizer.schedule=linear"),
    keys("optimizer.timescale_share=0.0"),
    keys("probe.temperature=0.0"),
    keys("evaluate.rings=(20.0,10.0)"),
    keys("evaluate.votes=0"),
    keys("evaluate.severities=('mild',)"),
    keys("task=robustness ; evaluate.corruptions=()", "evaluate.corruptions"),
    keys("mesh.data=0"),
    keys("mesh.data=7", "mesh.data"),
    keys("mesh.fsdp=3"),
    keys("mesh.fsdp=0"),
    keys("task=probe", "config.checkpoint"),
    keys("task=probe ; checkpoint=nowhere", "config.checkpoint", "nowhere"),
    keys("task=evaluate ; checkpoint=.", "config.checkpoint"),
    keys("task=finetune ; checkpoint=/dev/null", "/dev/null"),
    keys("task=robustness", "config.checkpoint"),
]

# What no memory holds: refused by arithmetic, before anything is allocated.
SIZES = [
    keys("data.points_per_shard=1099511627776"),
    keys("data.scenes_per_shard=1099511627776"),
    keys("data.max_points=1099511627776"),
    keys("data.num_scenes=1099511627776"),
    keys("data.num_validation_scenes=1099511627776"),
    keys("data.scenes_per_step=1099511627776"),
    keys("data.cells_per_shard=(1099511627776,1099511627776,1099511627776)"),
    keys("data.halo_per_shard=(1099511627776,1099511627776,1099511627776)"),
    keys("data.voxels_per_shard=(1099511627776,1,1,1,1)"),
    keys("data.pairs_per_shard=(1099511627776,1,1,1,1)"),
    keys("data.pillars_per_shard=(1099511627776,)"),
    keys("model.name=vavit_g ; model.vavit.width=12288 ; model.vavit.depth=1024", "model.vavit.depth", "GB"),
    keys("data.image_size=(1000000,1000000)"),
    keys("data.image_size=(8192,8192) ; data.scenes_per_shard=65536", "data.image_size", "data.scenes_per_shard", "GB"),
    keys("model.grids=((1000000,1000000),(8,8),(8,8))"),
    keys("model.channels=100000"),
    keys("model.depth=100000"),
    keys("model.channels=16384 ; model.depth=1024", "model.channels", "model.depth", "GB"),
    keys("model.num_neighbors=1000000"),
    keys("model.head_hidden=1000000"),
    keys("model.minkunet.width=1000.0"),
    keys("optimizer.batch_size=1099511627776"),
    keys("probe.bank_per_class=1099511627776"),
    keys("probe.num_neighbors=1099511627776"),
    keys("evaluate.votes=1099511627776"),
    keys("demo.segment_points_per_shard=1099511627776"),
    keys("demo.segment_scenes_per_shard=1099511627776"),
    keys("demo.segment_max_points=1099511627776"),
    keys("teacher_training.num_pixels=1099511627776"),
    keys("teacher_training.vit.width=1099511627776"),
    keys("teacher_training.vit.depth=1099511627776"),
    keys("teacher_training.vit.hidden=1099511627776"),
    keys("teacher_training.vit.position_grid=(1048576,1048576)"),
]


@pytest.mark.parametrize("row", hostile.rows_of(FLAGS, FILES, KEYS, SIZES, fast=4))
def test_the_law(row, things, street_cache, tmp_path, capfd):
    outcome = hostile.run("main", row, things, tmp_path, capfd)
    hostile.check(row, outcome)
