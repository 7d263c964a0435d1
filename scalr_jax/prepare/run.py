"""Write a raw dataset as ArrayRecord files that train several times faster than the raw files.

    python -m scalr_jax.prepare --dataset=nuscenes --root=RAW --output=DIR
    python -m scalr_jax.prepare --dataset=pandaset --sensor=pandargt --root=RAW --output=DIR --labels
    python -m scalr_jax.prepare --dataset=semantic_kitti --root=RAW --output=DIR --image_size=224,448
    python -m scalr_jax.prepare --output=DIR --verify
    python -m scalr_jax.prepare --teacher=CHECKPOINT --image_size=224,448 --root=RECORDS --output=TOKENS

Then train with --config.data.root=DIR. The same command again goes on where it stopped, also after a kill or a full
disk. docs/records.md says what is stored.

Flags:
    --dataset           nuscenes, semantic_kitti, pandaset (also pandar64, pandargt), folder or streets
    --root              the raw dataset (for streets the cache of rendered scenes)
    --output            the folder to write; PandaSet's go to <output>/pandar64 and <output>/pandargt
    --split             some of train, validation, all (default: train,validation; one without frames is left out)
    --sensor            of pandaset: pandar64 (default) or pandargt; of streets: beams32, ...
    --labels            also store every scan whole, with its labels, for probing, fine-tuning and evaluation
    --image_size        rows,columns: store the images resized to what the teacher will see (default: original files)
    --image_format      original; jpeg (quality 95, 4:4:4; default with --image_size); raw (exact, no decoding, large)
    --num_processes     processes that write (default: 2)
    --frames_per_shard  frames of one file (default: 128); what a kill costs at most, for each process
    --num_scenes        of streets: how many to render (default: 64)
    --verify            compare every byte of a prepared folder with what was written
    --inspect           only look: tables, pictures and statistics of the raw dataset go to <output>

Flags of a teacher's tokens, which are computed once and then train with --config.teacher.cache=TOKENS (docs/tokens.md):
    --teacher           a DINO file, as teacher.checkpoint; demo: the packaged one
    --root, --dataset   prepared records, and no --dataset; or a raw dataset (default split: train)
    --image_size        rows,columns that the teacher sees, as data.image_size
    --tokens            bfloat16 (default); int8, with a scale a token: half as large; float32: exact
    --feature           x_pre_norm (default) or x, as teacher.feature
    --antialias         as data.antialias, which it is by default; --noantialias: not
    --position_interpolation   as teacher.position_interpolation
    --cache             with --inspect: draw these tokens over images and points of --root

Exit codes: 0 done; 2 bad arguments or input, no space, or interrupted (one sentence on stderr); 1 a defect.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

from absl import flags
from tqdm import tqdm

from scalr_jax.config import INTERPOLATIONS, TeacherSettings
from scalr_jax.data.joined import Joined
from scalr_jax.data.manifest import FORMAT, IMAGE_FORMATS
from scalr_jax.data.readers.folder import Folder
from scalr_jax.data.readers.records import Records, is_begun, is_prepared
from scalr_jax.data.readers.scan_inputs import open_reader
from scalr_jax.data.scenes import Dataset
from scalr_jax.data.streets.streets import Streets
from scalr_jax.data.tokens.store import DTYPES, TOKENS, TokenStore
from scalr_jax.prepare import session as record_run
from scalr_jax.prepare.source import Images, Source
from scalr_jax.prepare.writing import AGAIN, plan_shards
from scalr_jax.runtime.command_line import exit_codes, parse_flags, require
from scalr_jax.runtime.errors import InputError

DATASETS = ("nuscenes", "semantic_kitti", "pandaset", "pandar64", "pandargt", "folder", "streets")
VOXEL_SIZE = 0.1  # metres, as published; with another data.voxel_size a loader finds the voxels itself
MAX_IMAGE_SIZE = 8_192  # rows or columns, as of data.image_size
SENSORS = {"pandaset": "pandar64", "pandar64": "pandar64", "pandargt": "pandargt", "streets": "beams32"}

FEATURES = ("x_pre_norm", "x")  # of a teacher

FLAGS = flags.FlagValues()  # its own: `scalr_jax.main` defines flags of the same names
flags.DEFINE_enum("dataset", None, DATASETS, "The raw dataset.", flag_values=FLAGS)
flags.DEFINE_string("root", None, "Its folder.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "The folder to write.", flag_values=FLAGS)
flags.DEFINE_list("split", [], "Splits to write.", flag_values=FLAGS)
flags.DEFINE_string("sensor", "", "Of pandaset and streets.", flag_values=FLAGS)
flags.DEFINE_boolean("labels", False, "Also store whole scans and labels.", flag_values=FLAGS)
flags.DEFINE_list("image_size", [], "Rows, columns.", flag_values=FLAGS)
flags.DEFINE_enum("image_format", None, IMAGE_FORMATS, "How images are stored.", flag_values=FLAGS)
flags.DEFINE_integer("num_processes", 2, "Processes that write.", 1, 1024, flag_values=FLAGS)
flags.DEFINE_integer("frames_per_shard", 128, "Frames of one file.", 1, 10**6, flag_values=FLAGS)
flags.DEFINE_integer("num_scenes", 64, "Of streets.", 1, 10**6, flag_values=FLAGS)
flags.DEFINE_boolean("verify", False, "Compare every byte with what was written.", flag_values=FLAGS)
flags.DEFINE_boolean("inspect", False, "Only look at the raw dataset.", flag_values=FLAGS)
flags.DEFINE_string("cache", None, "Tokens to look at.", flag_values=FLAGS)
flags.DEFINE_string("teacher", None, "Whose tokens are computed.", flag_values=FLAGS)
flags.DEFINE_enum("tokens", "bfloat16", tuple(DTYPES), "How tokens are stored.", flag_values=FLAGS)
flags.DEFINE_enum("feature", "x_pre_norm", FEATURES, "Which tokens.", flag_values=FLAGS)
flags.DEFINE_boolean("antialias", True, "How images are resized.", flag_values=FLAGS)
flags.DEFINE_enum("position_interpolation", "auto", INTERPOLATIONS, "Of the teacher.", flag_values=FLAGS)


def image_size() -> tuple[int, int] | None:
    """Rows and columns of --image_size; None when it was not given. Raises InputError."""
    try:
        size = tuple(int(number) for number in FLAGS.image_size)
    except ValueError:
        size = (0,)
    if size and (len(size) != 2 or min(size) < 1 or max(size) > MAX_IMAGE_SIZE):
        given = ",".join(FLAGS.image_size)
        raise InputError(f"--image_size={given} must be rows,columns, as in 224,448, at most {MAX_IMAGE_SIZE} each")
    return (size[0], size[1]) if size else None


def image_choice() -> Images:
    """How images are stored, by the flags."""
    size = image_size()
    if FLAGS.dataset == "streets":  # rendered at this size
        return Images(FLAGS.image_format or "original")
    if size and FLAGS.image_format == "original":
        problem = "--image_format=original keeps the files as they are"
        raise InputError(f"{problem}; leave out --image_size, or take jpeg or raw")
    return Images(FLAGS.image_format or ("jpeg" if size else "original"), size)


def open_raw(split: str, *, labels: bool) -> Dataset:
    """The raw reader of a split. Raises InputError."""
    if FLAGS.dataset != "streets":
        return open_reader(FLAGS.dataset, Path(FLAGS.root), sensor=sensor(), split=split, labels=labels)
    rows, columns = map(int, FLAGS.image_size[:2] or (112, 224))
    options = {"num_scenes": FLAGS.num_scenes, "sensors": (sensor(),), "image_size": (rows, columns)}
    streets = Streets(FLAGS.root, split=split, **options)
    streets.render_missing()
    return streets


def sensor() -> str:
    """The lidar's name, of datasets with several."""
    return FLAGS.sensor or SENSORS.get(FLAGS.dataset, "")


def open_sources(images: Images) -> dict[str, Source]:
    """The frames of every wanted split that has some. Raises InputError."""
    sources, reasons = {}, {}
    for split in FLAGS.split or ("train", "validation"):
        try:
            sources[split] = open_source(split, images)
        except InputError as error:
            reasons[split] = error
            if FLAGS.split:
                raise
    if not sources:
        raise next(iter(reasons.values()))
    for split, error in reasons.items():
        print(f"split {split} is left out: {error}\n")
    return sources


def open_source(split: str, images: Images) -> Source:
    """The frames of one split: those with an image, and with --labels those with labels."""
    labelled = open_raw(split, labels=True) if FLAGS.labels else None
    try:
        reader = open_raw(split, labels=False)
    except InputError:
        if labelled is None:
            raise
        reader = None  # labels only
    source = Source(reader, labelled, VOXEL_SIZE, images)
    if not len(source):
        if isinstance(reader, Folder):
            reader.check_distillable()  # names what is missing
        raise InputError(f"{FLAGS.root}: no frame has an image, and without --labels nothing else is stored")
    return source


def write_records(images: Images) -> None:
    """Estimates and prints the size, writes what is missing, finishes, and lists what was left out.

    Raises InputError: the extra `prepare` is not installed.
    """
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise InputError('preparing records needs the prepare extra: pip install "scalr_jax[prepare]"')
    folder, dataset = Path(FLAGS.output), FLAGS.dataset
    if dataset in ("pandaset", "pandar64", "pandargt"):  # its two lidars have a folder each
        folder, dataset = folder / sensor(), "pandaset"
    sources = open_sources(images)
    described = {split: source.dataset.describe() for split, source in sources.items()}
    print("\n\n".join(described.values()), "\n")
    choices = {"dataset": dataset, "sensor": sensor(), "labels": FLAGS.labels, "voxel_size": VOXEL_SIZE}
    choices |= {"image_format": images.format, "image_size": images.size}
    settings = record_run.run_settings(choices, sources, FLAGS.frames_per_shard)
    shards = [s for name, source in sources.items() for s in plan_shards(name, len(source), FLAGS.frames_per_shard)]
    with record_run.claimed(folder, settings, record_run.finished_records) as finished:
        found, total = record_run.estimate(sources), sum(len(source) for source in sources.values())
        missing = sum(shard.last - shard.first for shard in shards if shard.file not in finished)
        space = record_run.need_space(folder, missing * found.bytes_per_frame * record_run.SPARE)
        print(f"to write: {missing} of {total} frames, {len(shards) - len(finished)} of {len(shards)} files: {space}")
        if lost := found.fidelity:
            print(
                "stored as JPEG, quality 95, 4:4:4: pixels differ from those of the original files by "
                f"{lost['mean_abs']:.2f} of 255 on average and {lost['max_abs']:.0f} at most, PSNR "
                f"{lost['psnr_db']:.1f} dB, in {lost['images']} images"
            )
        with tqdm(total=total, initial=total - missing, unit="frame", mininterval=1.0) as bar:
            parts = record_run.write_missing(folder, sources, shards, finished, FLAGS.num_processes, bar.update)
        reader = next(iter(sources.values())).dataset
        manifest = {
            **choices,
            "format": FORMAT,
            "scalr_jax": importlib.metadata.version("scalr_jax"),
            "source": str(FLAGS.root),
            "intensity": reader.intensity(0),
            "class_names": reader.class_names,
            "cameras": next((source.cameras for source in sources.values() if source.cameras), ()),
            "points_dtype": found.points_dtype,
            "fidelity": found.fidelity,
            "settings": settings,
        }
        record_run.finish(folder, shards, parts, manifest, described)
    written = [parts[shard.file] for shard in shards]
    for part in written:
        for text in part["bad"]:
            print(f"skipped a bad frame: {text}")
        for text in part["problems"]:
            print(f"left out an image: {text}")
    frames, size = sum(len(part["names"]) for part in written), sum(part["bytes"] for part in written)
    print(f"{folder}: {frames} frames in {len(written)} files, {size / 1e9:.3f} GB")
    print(f"train with --config.data.root={FLAGS.output}")


def open_images() -> Dataset:
    """The frames whose images the teacher sees: records, also those of several lidars, or a raw dataset."""
    root, datasets = Path(FLAGS.root), []
    folders = [root] if is_begun(root) or not root.is_dir() else sorted(filter(is_prepared, root.iterdir()))
    for split in FLAGS.split or ("train",):
        if folders and (is_begun(root) or folders != [root]):
            datasets += [Records(folder, split=split, image_size=image_size()) for folder in folders]
        else:
            require(FLAGS, "dataset", "root", example="--root=RECORDS, or --dataset=nuscenes --root=RAW")
            datasets.append(open_raw(split, labels=False))
    return Joined(datasets)


def write_teacher() -> None:
    """--teacher."""
    size = image_size()
    if size is None:
        raise InputError("--teacher needs --image_size=ROWS,COLUMNS, that of data.image_size, as in 224,448")
    from scalr_jax.prepare import tokens

    settings = {"feature": FLAGS.feature, "position_interpolation": FLAGS.position_interpolation}
    choices = tokens.Choices(TeacherSettings(checkpoint=FLAGS.teacher, **settings), size, FLAGS.antialias, FLAGS.tokens)
    more = {"images_per_file": FLAGS.frames_per_shard, "num_threads": FLAGS.num_processes}
    tokens.write_tokens(Path(FLAGS.output), open_images(), choices, **more)


def verify() -> None:
    """--verify, of a folder or of the folders of several sensors in it."""
    output = Path(FLAGS.output)
    if (output / TOKENS).is_file():
        from scalr_jax.prepare import tokens

        with tqdm(unit="B", unit_scale=True, mininterval=1.0) as bar:
            found = tokens.verify(output, bar.update)
        return print(found)
    folders = [output] if is_prepared(output) or not output.is_dir() else sorted(filter(is_prepared, output.iterdir()))
    for folder in folders or [output]:
        with tqdm(unit="B", unit_scale=True, mininterval=1.0) as bar:
            found = record_run.verify(folder, bar.update)
        print(found)


def run(arguments: list[str]) -> None:
    """The command. Raises InputError and what the operating system raises."""
    parse_flags(FLAGS, arguments, __doc__)
    if FLAGS.cache is not None:
        require(FLAGS, "cache", "root", "output", example="--inspect --cache=TOKENS --root=RECORDS --output=DIR")
    elif FLAGS.teacher is not None and not FLAGS.verify:
        require(FLAGS, "teacher", "root", "output", example="--teacher=CHECKPOINT --root=RECORDS --output=TOKENS")
    elif not (FLAGS.verify and FLAGS.output):
        require(FLAGS, "dataset", "root", "output", example="--dataset=nuscenes --root=RAW --output=DIR")
    images = image_choice()
    if FLAGS.verify:
        verify()
    elif FLAGS.cache is not None:
        from scalr_jax.prepare.token_pictures import inspect_tokens

        inspect_tokens(open_images(), TokenStore(FLAGS.cache), Path(FLAGS.output))
    elif FLAGS.inspect:
        from scalr_jax.prepare.inspect import inspect_dataset

        inspect_dataset(open_raw((FLAGS.split or ["train"])[0], labels=FLAGS.labels), Path(FLAGS.output))
    elif FLAGS.teacher is not None:
        write_teacher()
    else:
        write_records(images)


def main(arguments: list[str]) -> None:
    """`run`, with exit codes."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of the workers: their number is --num_processes
    with exit_codes(interrupted="the same command goes on where it stopped", full=AGAIN):
        run(arguments)
