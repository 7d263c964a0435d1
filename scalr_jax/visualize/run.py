"""Pictures of what a model learned, on one scan: features as colours, similarity to points, classes, a viewer.

    python -m scalr_jax.visualize --model=runs/probe --output=DIR
    python -m scalr_jax.visualize --model=runs/pretrain --input=scan.bin --output=DIR --query=8.5,-3.2,-0.5
    python -m scalr_jax.visualize --model=runs/pretrain --input=scan.bin --image=front.jpg --calibration=cameras.json \\
        --output=DIR
    python -m scalr_jax.visualize --model=scalr.pth --sensor=pandar64 --dataset=pandaset --root=PANDASET --index=20 \\
        --camera=front_camera --output=DIR

Without --input and --dataset a frame of the run's own dataset is taken (of generated streets one that it has not seen).
Into --output go pca.png, correlation_<n>.png, prediction.png (models with classes; beside the labels where there are
some) and viewer.html (interactive, opens without a network; needs the extra "view"). docs/predict.md has the rest.

Flags:
{model}
    --output         the folder to write
    --input          a scan, as predict takes it
    --image          its photograph, with
    --calibration    cameras.json: intrinsics, size and lidar_to_camera, as in docs/data.md
    --camera         which camera of the calibration or of the dataset's frame (default: the one, or the front one)
    --dataset        nuscenes, semantic_kitti, pandaset (pandar64), pandargt, folder or streets
    --root           its folder (of streets the cache of rendered scenes; default: <output>/streets)
    --split          of the dataset (default: all; of streets validation)
    --index          number of the frame (default: 0)
    --labels         take frames with labels, also without an image; --nolabels: read none
    --columns        float32 columns of a .bin file (default: 5 of nuScenes, else 4)
    --what           features (the backbone's) or distilled (in the teacher's space; default of models that have it)
    --query          x,y,z in metres: the point nearest to it is what others are compared with (default: several points
                     chosen from labels, or clusters of the features)
    --num_queries    how many are chosen (default: 4)
    --max_points     of the viewer (default: 30000)
    --rerun          instead of pictures frames.rrd, all frames over time for Rerun's viewer (extra "rerun"): of an
                     --input that is a folder of scans, or of a dataset --num_frames frames from --index on
    --num_frames     how many (default: 10; of a folder of scans all)

Exit codes: 0 done; 2 bad arguments or input, or no space (one sentence on stderr); 1 a defect.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from tqdm import tqdm

from scalr_jax.data.readers import scan_inputs
from scalr_jax.data.readers.records import Records, is_prepared
from scalr_jax.data.scan_checks import FARTHEST
from scalr_jax.data.scenes import IGNORE, Frame
from scalr_jax.data.streets.sensors import SENSORS as STREETS
from scalr_jax.evaluation.report import confusion_matrix, results_of
from scalr_jax.figures.colors import choose_queries, color_by_axes, cosine_similarity, fit_color_axes
from scalr_jax.figures.pictures import Panel, draw_panels, draw_predictions, draw_with_image
from scalr_jax.runtime import command_line
from scalr_jax.runtime.errors import BadFrameError, InputError, one_sentence
from scalr_jax.runtime.storage import check_writable, read_json
from scalr_jax.visualize.recording import Seen, check_rerun, write_recording
from scalr_jax.visualize.viewer import MAX_POINTS, write_viewer

if TYPE_CHECKING:
    from scalr_jax.api import Model

FLAGS = flags.FlagValues()  # its own: `scalr_jax.main` defines flags of the same names
command_line.define_model(FLAGS)
for _name in ("output", "input", "image", "calibration", "camera", "dataset", "root", "split"):
    flags.DEFINE_string(_name, None, "See --help.", flag_values=FLAGS)
flags.DEFINE_integer("index", 0, "Number of the frame.", flag_values=FLAGS)
flags.DEFINE_boolean("labels", None, "Frames with labels.", flag_values=FLAGS)
flags.DEFINE_integer("columns", None, "Of a .bin file.", flag_values=FLAGS)
flags.DEFINE_enum("what", None, ("features", "distilled"), "What to draw.", flag_values=FLAGS)
flags.DEFINE_list("query", None, "A place.", flag_values=FLAGS)
flags.DEFINE_integer("num_queries", 4, "How many are chosen.", 1, 20, flag_values=FLAGS)
flags.DEFINE_integer("max_points", MAX_POINTS, "Of the viewer.", 100, flag_values=FLAGS)
flags.DEFINE_boolean("rerun", False, "A recording for Rerun.", flag_values=FLAGS)
flags.DEFINE_integer("num_frames", None, "Of a recording.", 1, flag_values=FLAGS)


def see(model: Model, frame: Frame, what: str | None = None) -> Seen:
    """A model's results for a frame's finite points; `what` as in `visualize`. Raises InputError."""
    points = scan_inputs.student_points(frame)
    finite = np.asarray(np.isfinite(points).all(axis=1) & (np.abs(points[:, :3]) < FARTHEST).all(axis=1))
    what = what or ("distilled" if model.config.head == "distill" else "features")
    features = (model.distilled if what == "distilled" else model.embed)(points)[finite]
    predictions = model.segment(points)[finite] if model.class_names else None
    view = _part(frame, finite)
    labels = view.labels if view.labels is not None and (view.labels != IGNORE).any() else None
    return Seen(points[finite], view, features, predictions, labels)


def visualize(
    model: Model,
    frame: Frame,
    output: str | Path,
    *,
    label_names: Sequence[str] = (),
    what: str | None = None,
    query: Sequence[float] | None = None,
    num_queries: int = 4,
    max_points: int = MAX_POINTS,
) -> list[Path]:
    """Draws everything that model and frame allow; returns the files.

    Args:
      frame: of a dataset's reader or of `scan_inputs.read_frame`; with an image its points are drawn over it, too.
      output: the folder to write, made when missing.
      what: "features" or "distilled"; None: distilled where the model has it.
      query: [3] metres, the place of the point that others are compared with; None chooses `num_queries` points.

    Raises:
      InputError: no finite point, or a model without `what`.
    """
    folder = Path(output)
    what = what or ("distilled" if model.config.head == "distill" else "features")
    points, view, features, predictions, labels = see(model, frame, what)
    xyz = points[:, :3]
    colors = color_by_axes(features, fit_color_axes(features))
    files: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)

    def draw(name: str, title: str, panel: Panel, query: int | None = None) -> None:
        path = folder / name
        if view.image is not None and view.pixels is not None and view.visible is not None:
            seen = (view.image, view.pixels, view.visible)
            draw_with_image(path, xyz, title, panel, *seen, query=query)
        else:
            draw_panels(path, xyz, title, [panel], query=query)
        files.append(path)

    named = f"{'distilled features' if what == 'distilled' else 'features'} of {frame.name}"
    draw("pca.png", f"{named}: like colours, like features", Panel("three principal components", colors))
    if query is not None:
        chosen = [int(np.linalg.norm(xyz - np.asarray(query, np.float64), axis=1).argmin())]
    else:
        allowed = view.visible if view.visible is not None else np.ones(len(xyz), bool)  # what the image shows
        chosen = choose_queries(features, xyz, num_queries, labels=labels, allowed=allowed) or [0]
    for number, point in enumerate(chosen):
        similarity = cosine_similarity(features, point)
        place = ", ".join(f"{value:.1f}" for value in xyz[point])
        kind = f", {label_names[labels[point]]}" if labels is not None and labels[point] < len(label_names) else ""
        panel = Panel(f"query at ({place}) m{kind}", similarity, label="cosine similarity to the star")
        draw(f"correlation_{number}.png", f"{named}: similarity to one point", panel, point)
    if predictions is not None:
        files.append(folder / "prediction.png")
        title = f"classes of {frame.name}"
        if labels is not None and tuple(label_names) == tuple(model.class_names):
            title += _agreement(labels, predictions, label_names)
        draw_predictions(files[-1], xyz, title, predictions, model.class_names, labels=labels, label_names=label_names)
    classes = {} if predictions is None else {"prediction": (predictions, model.class_names)}
    classes |= {} if labels is None else {"label": (labels, label_names)}
    try:
        path = folder / "viewer.html"
        write_viewer(path, points, features, colors, chosen[0], title=named, classes=classes, max_points=max_points)
        files.append(path)
    except InputError as error:
        print(error, file=sys.stderr)
    return files


def _agreement(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> str:
    """How well predictions [N] agree with labels [N], for a title."""
    valid = (labels != IGNORE) & (predictions != IGNORE)
    found = results_of(confusion_matrix(labels[valid], predictions[valid], len(names)), names)
    return f": {found['accuracy']:.1%} of the labelled points right, mIoU of this scan {found['miou']:.3f}"


def _part(frame: Frame, kept: np.ndarray) -> Frame:
    """A frame's points where `kept` [N] is true; pixels in those of the image as it is."""
    part = frame._replace(points=frame.points[kept], labels=None if frame.labels is None else frame.labels[kept])
    if frame.image is None or frame.pixels is None or frame.visible is None:
        return part
    scale = np.array(frame.image.shape[:2]) / np.array(frame.image_shape or frame.image.shape[:2])
    return part._replace(pixels=frame.pixels[kept] * scale, visible=frame.visible[kept])


# ------------------------------------------------------------------------------------------------- which frame to draw


def open_frame(output: Path) -> tuple[Frame, Sequence[str]]:
    """The frame that the flags name, and the names of its labels. Raises InputError, BadFrameError."""
    if FLAGS.input and FLAGS.dataset:
        raise InputError("--input and --dataset both say what to draw; give one of them")
    if bool(FLAGS.image) != bool(FLAGS.calibration) or (FLAGS.image and not FLAGS.input):
        raise InputError(
            "--image, --calibration and --input are required together: a scan's photograph, its cameras.json, the scan"
        )
    if FLAGS.input:
        path = Path(FLAGS.input)
        if path.is_dir():
            raise InputError(f"{path} is a folder; give one scan of it, or --dataset=folder --root={path}")
        frame = scan_inputs.read_frame(path, columns=FLAGS.columns, sensor=FLAGS.sensor)
        if FLAGS.image:
            frame = scan_inputs.pair_image(frame, Path(FLAGS.image), Path(FLAGS.calibration), FLAGS.camera)
        return frame, ()
    dataset = _open_dataset(output)
    return scan_inputs.dataset_frame(dataset, FLAGS.index, FLAGS.camera), dataset.class_names


def record(model: Model, output: Path) -> None:
    """Writes frames.rrd, of the frames that the flags name; a bad one is named and left out. Raises InputError."""
    if FLAGS.image or FLAGS.calibration:
        raise InputError("--rerun takes images from a dataset: give --dataset=folder --root=DIR, and no --image")
    if FLAGS.input:
        scans, names = scan_inputs.list_scans(FLAGS.input)[: FLAGS.num_frames], ()
        reads = [partial(scan_inputs.read_frame, path, columns=FLAGS.columns, sensor=FLAGS.sensor) for path in scans]
    else:
        dataset = _open_dataset(output)
        names, last = dataset.class_names, FLAGS.index + (FLAGS.num_frames or 10)
        indices = range(FLAGS.index, max(min(last, len(dataset)), FLAGS.index + 1))
        reads = [partial(scan_inputs.dataset_frame, dataset, index, FLAGS.camera) for index in indices]

    def frames() -> Iterator[Seen]:
        for read in tqdm(reads, unit="frame"):
            try:
                yield see(model, read(), FLAGS.what)
            except (BadFrameError, InputError) as error:
                if len(reads) == 1:
                    raise
                tqdm.write(f"bad frame, left out: {one_sentence(error)}", file=sys.stderr)

    path = output / "frames.rrd"
    output.mkdir(parents=True, exist_ok=True)
    number = write_recording(path, frames(), model.class_names, names)
    if number == 0:
        path.unlink()
        raise InputError(f"none of {len(reads)} frames could be read; see the messages above")
    print(f"{path}: {number} frames; look at it with: rerun {path}")


def _open_dataset(output: Path) -> Any:
    """The reader of --dataset, or of the run's own dataset."""
    if FLAGS.dataset == "streets":
        sensor = FLAGS.sensor if FLAGS.sensor in STREETS else "beams32"
        return _streets(Path(FLAGS.root or output / "streets"), (sensor,), (224, 448), 0)
    if FLAGS.dataset:
        if not FLAGS.root:
            raise InputError(f"--root is required with --dataset={FLAGS.dataset}: the folder that holds it")
        return _open_raw(FLAGS.dataset, Path(FLAGS.root))
    config = _run_config(Path(FLAGS.model))
    data = config["data"]
    name, root = data["dataset"], data["root"]
    if name == "streets" and not (root and is_prepared(root)):
        folder = Path(root or Path(FLAGS.model) / "streets")
        return _streets(folder, tuple(data["sensors"]), tuple(data["image_size"]), config["seed"])
    if "+" in name or name == "merged":
        raise InputError(
            f"{FLAGS.model} was trained on several datasets ({name}); say which frame to draw with --input=SCAN, or "
            "with --dataset, --root and --index"
        )
    return _open_raw(next(iter(data["sensors"])) if name == "pandaset" else name, Path(root))


def _open_raw(name: str, root: Path) -> Any:
    if is_prepared(root):
        return Records(root, split=FLAGS.split or "all", labels=bool(FLAGS.labels))
    return scan_inputs.open_dataset(name, root, split=FLAGS.split or "all", labels=FLAGS.labels)


def _streets(root: Path, sensors: tuple[str, ...], size: tuple[int, int], seed: int) -> Any:
    """Generated streets up to the wanted one, rendered where they are missing."""
    from scalr_jax.data.streets.streets import Streets

    if FLAGS.index < 0:
        raise InputError(f"--index={FLAGS.index}: frames are numbered from 0")
    split = FLAGS.split or "validation"
    number = FLAGS.index + ((FLAGS.num_frames or 10) if FLAGS.rerun else 1)
    streets = Streets(root, split=split, num_scenes=number, sensors=sensors, image_size=size, seed=seed)
    streets.render_missing()
    return streets


def _run_config(workdir: Path) -> dict:
    try:
        config = read_json(workdir / "config.json", "")
        data, seed = config["data"], config["seed"]
        texts = [data["dataset"], data["root"], *data["sensors"]]
        rows, columns = data["image_size"]
        if not (all(isinstance(text, str) for text in texts) and {*map(type, (rows, columns, seed))} == {int}):
            raise ValueError
        if not (texts[2:] and rows > 0 and columns > 0):
            raise ValueError
        return {"data": data, "seed": seed}
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{workdir} is not the workdir of a run, which would say its dataset; give --input=SCAN, or --dataset, "
            "--root and --index"
        ) from None


def run(arguments: list[str]) -> None:
    """The command. Raises InputError, BadFrameError and what the operating system raises."""
    command_line.parse_flags(FLAGS, arguments, __doc__)
    command_line.require(FLAGS, "model", "output", example="--model=runs/pretrain --input=scan.bin --output=DIR")
    query = command_line.numbers(FLAGS, "query", 3)
    output = Path(FLAGS.output)
    check_writable(output / "viewer.html")
    if FLAGS.rerun:
        check_rerun()
    from scalr_jax import api  # starts JAX

    command_line.use_cache(FLAGS.cache)
    model = api.load(**command_line.model_arguments(FLAGS))
    if FLAGS.rerun:
        return record(model, output)
    frame, label_names = open_frame(output)
    for text in model.check(scan_inputs.student_points(frame)).values():
        print(f"warning: {frame.name}: {text}", file=sys.stderr)
    options: dict = {"what": FLAGS.what, "num_queries": FLAGS.num_queries, "max_points": FLAGS.max_points}
    try:
        drawn = visualize(model, frame, output, label_names=label_names, query=query, **options)
    except InputError as error:
        raise InputError(command_line.named(frame.name, error)) from error
    print(f"{output}: {', '.join(path.name for path in drawn)}")


def main(arguments: list[str]) -> None:
    """`run`, with exit codes."""
    with command_line.exit_codes():
        run(arguments)
