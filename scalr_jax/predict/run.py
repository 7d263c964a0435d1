"""Features or labels for every point of a scan, or of each scan of a folder.

    python -m scalr_jax.predict --model=runs/pretrain --input=scan.bin --output=features.npz
    python -m scalr_jax.predict --model=runs/probe --input=SCANS --output=DIR --formats=label,ply,png
    python -m scalr_jax.predict --model=scalr.pth --sensor=nuscenes --input=LIDAR_TOP --output=DIR --dtype=float16

A scan is a .bin (KITTI's, nuScenes'), .npy, .pcd or .ply file, or PandaSet's <scene>/lidar/NN.pkl.gz; points stand in
the frame of the training data: the lidar's, in metres, about 1.7 m above the ground. Every point gets a row: outside
the field of view that of the nearest point inside, without finite coordinates features 0 or class 255. Of a folder all
scans are done and finished ones skipped: the same command again goes on. docs/predict.md has the rest.

Flags:
{model}
    --input          a scan, or a folder of scans
    --output         a file whose ending is a format, or a folder (default: out.npz; of a folder: predictions)
    --formats        some of npz, npy, label (SemanticKITTI's), ply (coloured), png (to look at), and of a folder mp4
                     (a video of its pictures, video.mp4; needs the extra "video"); default: npz
    --what           labels (default of a probed or fine-tuned model), features (the backbone's; default of others), or
                     distilled (in the teacher's space)
    --sector         from,to in degrees, 0 along x, 90 along y: only these points go through the network, as in a
                     camera's view (-40,40); others get features 0 or class 255. Default: the whole turn
    --columns        float32 columns of a .bin file (default: 5 of nuScenes, else 4)
    --dtype          of features: float32 (default) or float16
    --overwrite      of a folder: do finished scans again, also those of another model

Exit codes: 0 done; 2 bad arguments or input, no space, or interrupted (one sentence on stderr); of a folder also when
one scan was bad, after the others; 1 a defect.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from tqdm import tqdm

from scalr_jax.data.readers import scan_inputs
from scalr_jax.data.scenes import IGNORE
from scalr_jax.data.sensors import raw_labels
from scalr_jax.figures import colors as correlation
from scalr_jax.interop.finite import narrowed
from scalr_jax.predict.outputs import FORMATS, Prediction, check_formats, write
from scalr_jax.predict.video import check_video, write_video
from scalr_jax.runtime import command_line
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.runtime.storage import check_writable, differences, locked, read_json, write_arrays, write_json

if TYPE_CHECKING:
    from scalr_jax.api import Model

WHATS = ("labels", "features", "distilled")
SETTINGS = "predict.json"  # in an output folder: what its files were made with
LOOK = "colors.npz"  # in an output folder: the axes of its pictures' colours and the square that they show
VIDEO = "video.mp4"  # in an output folder
LOCK = ".predict.lock"
AGAIN = "free space on the disk and run the same command again: finished scans are kept"

FLAGS = flags.FlagValues()  # its own: `scalr_jax.main` defines flags of the same names
command_line.define_model(FLAGS)
flags.DEFINE_string("input", None, "A scan, or a folder of scans.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "A file or a folder.", flag_values=FLAGS)
flags.DEFINE_list("formats", [], "What to write.", flag_values=FLAGS)
flags.DEFINE_enum("what", None, WHATS, "What to predict.", flag_values=FLAGS)
flags.DEFINE_list("sector", None, "From, to in degrees.", flag_values=FLAGS)
flags.DEFINE_integer("columns", None, "Of a .bin file.", flag_values=FLAGS)
flags.DEFINE_enum("dtype", "float32", ("float32", "float16"), "Of features.", flag_values=FLAGS)
flags.DEFINE_boolean("overwrite", False, "Do finished scans again.", flag_values=FLAGS)


def parse(arguments: list[str]) -> None:
    """Fills `FLAGS`. Raises InputError."""
    command_line.parse_flags(FLAGS, arguments, __doc__)
    command_line.require(FLAGS, "model", "input", example="--model=runs/pretrain --input=scan.bin")


def predict(model: Model, points: np.ndarray, what: str, *, sector: tuple[float, float] | None = None) -> np.ndarray:
    """`what` ("features", "distilled" or "labels") of points [N, 4]: [N, C] float32 or class ids [N] int32.

    Outside the `sector` (from, to in degrees about z, 0 along x and 90 along y) it is 0 or 255. Raises `InputError` for
    points that are none, too few in the field of view, outputs that are not finite, or a model without `what`.
    """
    function = {"features": model.embed, "distilled": model.distilled, "labels": model.segment}[what]
    if sector is None:
        return function(points)
    inside = in_sector(points, sector)
    if not inside.any():
        raise InputError(f"none of {len(points)} points lies between {sector[0]:g} and {sector[1]:g} degrees")
    rows = function(points[inside])
    out = np.full((len(points), *rows.shape[1:]), IGNORE if what == "labels" else 0, rows.dtype)
    out[inside] = rows
    return out


def in_sector(points: np.ndarray, sector: tuple[float, float]) -> np.ndarray:
    """Which points [N, 3+] lie counter-clockwise from the first to the second angle (degrees), as [N] bool."""
    with np.errstate(invalid="ignore"):
        angle = np.degrees(np.arctan2(points[:, 1], points[:, 0]))
        return (angle - sector[0]) % 360.0 <= (sector[1] - sector[0]) % 360.0  # no number is in no sector


def choose_what(head: str, requested: str | None) -> str:
    """Chooses what to predict with a model of this head. Raises InputError when it cannot."""
    segments = head != "distill"
    if requested is None:
        return "labels" if segments else "features"
    if requested == "labels" and not segments:
        raise InputError(
            "this model was only distilled and has no classes; probe or fine-tune it, or take --what=features"
        )
    if requested == "distilled" and segments:
        raise InputError("this model has classes and no features in a teacher's space; take --what=features or labels")
    return requested


def _formats() -> list[str]:
    """The formats of each scan that --formats names: a video is made of pictures. Raises InputError."""
    formats = [name.strip().lstrip(".") for name in FLAGS.formats]
    if "mp4" in formats and not Path(FLAGS.input).is_dir():
        raise InputError(f"--formats=mp4 is a video of a folder of scans, and {FLAGS.input} is one scan; take png")
    if "mp4" in formats:
        check_video()
    return list(dict.fromkeys("png" if name == "mp4" else name for name in formats))


def choose_outputs(scans: list[Path]) -> tuple[dict[Path, list[Path]], Path | None]:
    """The files to write for each scan, and the folder when the input is one. Raises InputError."""
    many = Path(FLAGS.input).is_dir()
    output = Path(FLAGS.output or ("predictions" if many else "out.npz"))
    formats = _formats()
    if not many and (FLAGS.output or "").endswith(".mp4"):
        raise InputError(f"--output={output}: a video is of a folder of scans; give one as --input, and --formats=mp4")
    if not many and output.suffix and not output.is_dir():
        formats = list(dict.fromkeys([output.suffix[1:], *formats]))
        chosen = {scans[0]: [output.with_suffix(f".{name}") for name in formats]}
    elif many and output.is_file():
        raise InputError(f"{output} is a file, and {FLAGS.input} is a folder; give a folder as --output")
    elif output.suffix[1:] in FORMATS and not output.is_dir():
        raise InputError(
            f"--output={output} names one file, and {FLAGS.input} is a folder; give a folder and --formats"
        )
    else:
        formats = formats or ["npz"]
        chosen = {scan: [output / f"{scan_inputs.stem(scan)}.{name}" for name in formats] for scan in scans}
    inputs = {os.path.realpath(scan) for scan in scans}  # a link to itself stays what it is
    for path in (path for paths in chosen.values() for path in paths):
        if os.path.realpath(path) in inputs:
            raise InputError(f"{path} is an input and would be overwritten; give another --output")
    check_writable(next(iter(chosen.values()))[0])
    return chosen, output if many else None


class _Warnings:
    """Prints the first sentence of each kind, and at the end the number of other scans with it."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def add(self, name: str, found: dict[str, str]) -> None:
        for kind, text in found.items():
            if not self._seen[kind]:
                tqdm.write(f"warning: {name}: {text}", file=sys.stderr)
            self._seen[kind] += 1

    def close(self) -> None:
        for kind, number in self._seen.items():
            if number > 1:
                print(f"warning: {kind}: the like for {number} scans", file=sys.stderr)


class _Look:
    """How predictions are drawn: colours of classes, or by the principal axes of the first scan's features, and the
    square of its top view; kept in a file."""

    def __init__(self, model: Model, what: str, path: Path | None):
        self._names, self._what, self._path = model.class_names, what, path
        self._axes: correlation.ColorAxes | None = None
        self._box: tuple[np.ndarray, float] | None = None
        if path is not None and path.exists():
            with contextlib.suppress(Exception), np.load(path) as arrays:  # what cannot be read is made again
                self._box = (arrays["corner"], float(arrays["side"])) if "side" in arrays else None
                self._axes = correlation.ColorAxes(*(arrays[name] for name in correlation.ColorAxes._fields))

    def _keep(self) -> None:
        if self._path is not None:
            axes = self._axes._asdict() if self._axes else {}
            box = {"corner": self._box[0], "side": np.float64(self._box[1])} if self._box else {}
            write_arrays(self._path, axes | box)

    def box(self, xyz: np.ndarray) -> tuple[np.ndarray, float]:
        """The lowest corner [2] and the side (metres) of the square that pictures show."""
        if self._box is None:
            from scalr_jax.figures.pictures import top_view_box

            self._box = top_view_box(xyz)
            self._keep()
        return self._box

    def colors(self, rows: np.ndarray) -> np.ndarray:
        """[N, 3] uint8 for rows [N, C], or [N] classes."""
        if self._what == "labels":
            from scalr_jax.figures.pictures import color_labels

            return color_labels(rows, self._names)
        if self._axes is None:
            self._axes = correlation.fit_color_axes(rows)
            self._keep()
        return correlation.color_by_axes(rows, self._axes)


def _run_one(model: Model, what: str, scan: Path, paths: list[Path], warn: _Warnings, look: _Look) -> int:
    """One scan: read, predict, write. Returns its number of points; raises InputError, which names it, and OSError."""
    try:
        frame = scan_inputs.read_frame(scan, columns=FLAGS.columns, sensor=FLAGS.sensor)
        points = scan_inputs.student_points(frame)
        warn.add(scan.name, model.check(points))
        rows = predict(model, points, what, sector=_sector())
        kept = rows if what == "labels" else narrowed(rows, FLAGS.dtype, "give --dtype=float32")
    except (BadFrameError, InputError) as error:
        raise InputError(command_line.named(scan, error)) from error
    colored = any(path.suffix in (".ply", ".png") for path in paths)
    colors = look.colors(rows) if colored else np.empty((0, 3), np.uint8)
    box = look.box(points[:, :3]) if any(path.suffix == ".png" for path in paths) else None
    for path in paths:
        write(Prediction(frame.name, points, what, kept, colors, model.class_names, box), path)
    return len(points)


def _sector() -> tuple[float, float] | None:
    found = command_line.numbers(FLAGS, "sector", 2)
    return None if found is None else (found[0], found[1])


def settings_of(model: Model, what: str) -> dict:
    """Settings that decide the content of an output file, for predict.json."""
    import jax

    checksum = 0
    for leaf in jax.tree.leaves(jax.device_get(model.variables)):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), checksum)
    keys = ("intensity", "field_of_view", "grids", "voxel_size", "num_neighbors", "activation", "dtype")
    chosen = {"what": what, "sector": FLAGS.sector, "columns": FLAGS.columns, "feature_dtype": FLAGS.dtype}
    found = {**chosen, "sensor": FLAGS.sensor, "weights": f"{checksum:08x}", **{key: model.config[key] for key in keys}}
    if model.student.needs.voxel_size is not None:  # weights do not determine voxels and reading
        found |= {"name": model.config.name, "minkunet": model.config.minkunet.to_dict()}
    return json.loads(json.dumps(found))  # tuples as they are read back


@contextlib.contextmanager
def claimed(folder: Path, settings: dict, *, anew: bool) -> Iterator[None]:
    """Holds an output folder for one run. Raises InputError when another run does, or when it had other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, "wait for it or stop it"):
        path = folder / SETTINGS
        saved = settings if anew or not path.exists() else read_json(path, "give another --output, or --overwrite")
        if found := differences(saved, settings):
            raise InputError(
                f"{folder} holds predictions of another model or other settings ({found}); give another --output, or "
                "--overwrite"
            )
        if anew:
            (folder / LOOK).unlink(missing_ok=True)
        write_json(path, settings)
        yield


def _run_folder(model: Model, what: str, outputs: dict[Path, list[Path]], folder: Path) -> None:
    """Every scan that is not finished; raises InputError at the end when some were bad."""
    warn, bad, done, points = _Warnings(), [], 0, 0
    anew = FLAGS.overwrite or not any(path.exists() for paths in outputs.values() for path in paths)
    with claimed(folder, settings_of(model, what), anew=anew):
        look = _Look(model, what, folder / LOOK)
        missing = {s: paths for s, paths in outputs.items() if FLAGS.overwrite or not all(map(Path.exists, paths))}
        started = time.monotonic()
        every = 1.0 if sys.stderr.isatty() else 10.0  # seconds
        options = {"unit": "scan", "mininterval": every, "smoothing": 0, "desc": str(folder)}
        with tqdm(total=len(outputs), initial=len(outputs) - len(missing), **options) as bar:
            for scan, paths in missing.items():
                try:
                    points += _run_one(model, what, scan, paths, warn, look)
                    done += 1
                    bar.set_postfix_str(paths[0].name, refresh=False)
                except InputError as error:
                    bad.append(command_line.one_sentence(error))
                    tqdm.write(f"bad scan, left out: {bad[-1]}", file=sys.stderr)
                bar.update()
                if done == 1:  # which waited for the compiler: the rate is that of the others
                    bar.unpause()
                    bar.initial = bar.n
        warn.close()
        if any(name.strip(" .") == "mp4" for name in FLAGS.formats) and (done or not (folder / VIDEO).exists()):
            drawn = [path for paths in outputs.values() for path in paths if path.suffix == ".png" and path.exists()]
            if drawn:
                write_video(folder / VIDEO, drawn)
    seconds = (time.monotonic() - started) / max(done, 1)
    skipped = f", {len(outputs) - len(missing)} were there" if len(missing) < len(outputs) else ""
    scans = "1 scan" if done == 1 else f"{done} scans"
    print(f"{folder}: {what} of {scans}, {points:,} points, {seconds:.2f} s a scan{skipped}")
    if bad:
        raise InputError(f"{len(bad)} of {len(outputs)} scans are bad, the others are done; the first: {bad[0]}")


def run(arguments: list[str]) -> None:
    """The command. Raises InputError and what the operating system raises."""
    parse(arguments)
    _sector()  # so that a mistake in it shows before anything is loaded
    scans = scan_inputs.list_scans(FLAGS.input)
    outputs, folder = choose_outputs(scans)
    formats = [path.suffix[1:] for path in next(iter(outputs.values()))]
    check_formats(formats, FLAGS.what or "labels")
    from scalr_jax import api  # starts JAX

    command_line.use_cache(FLAGS.cache)
    model = api.load(**command_line.model_arguments(FLAGS))
    what = choose_what(model.config.head, FLAGS.what)
    check_formats(formats, what)
    if "label" in formats:
        dataset = raw_labels(np.zeros(1, np.int32), model.class_names)[1]
        print(f".label files hold {f'the label numbers of {dataset}' if dataset else 'class ids, 255 for none'}")
    if folder is not None:
        return _run_folder(model, what, outputs, folder)
    warn, paths = _Warnings(), outputs[scans[0]]
    started = time.monotonic()
    number = _run_one(model, what, scans[0], paths, warn, _Look(model, what, None))
    print(f"{', '.join(map(str, paths))}: {what} of {number:,} points, {time.monotonic() - started:.2f} s")


def main(arguments: list[str]) -> None:
    """`run`, with exit codes."""
    with command_line.exit_codes(interrupted="the same command goes on where it stopped", full=AGAIN):
        run(arguments)
