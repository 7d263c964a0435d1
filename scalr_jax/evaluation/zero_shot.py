"""Classes for points without one labelled scan, from images alone, after IGLOSS (Samet, Puy, Marlet, 2026).

    prototype = mean over pixels of t / |t|,  t the teacher's feature of a pixel of a prototype image
    logits    = W f / |f| + b,                f the student's distilled feature of a point

W and b are a logistic regression on the unit prototypes, one class against the rest, balanced over classes. Two kinds
of prototypes: the images of a folder with one folder a class, as IGLOSS has them (there generated from the class's
name), or, without such a folder, the regions of training images whose points have a class: one prototype an image and
class. The latter needs labels, of image regions: it says how well distilled features agree with the teacher's, and is
no zero-shot figure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scalr_jax.config import ProbeSettings
from scalr_jax.data.readers import files
from scalr_jax.data.scenes import IGNORE, Batch, Dataset, SceneNeeds
from scalr_jax.data.transforms import check_classes, resize_image
from scalr_jax.models.student import Classifier, Student, Variables
from scalr_jax.ops.bilinear import sample_tokens
from scalr_jax.runtime.errors import BadFrameError, InputError, too_many_bad
from scalr_jax.train.losses import normalize
from scalr_jax.train.teachers import Source, Teacher, tokens_of_images

Array = jax.Array

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ZeroShot(NamedTuple):
    """`apply(variables, batch, train=False)` -> logits [D, P, classes]. variables: {"student", "weights", "bias"}."""

    student: Classifier  # with its distillation head

    @property
    def needs(self) -> SceneNeeds:
        return self.student.needs

    def apply(self, variables: Variables, batch: Batch, *, train: bool) -> Array:
        distilled = self.student.apply(variables["student"], batch, train=train)
        unit = normalize(distilled, jnp.ones(distilled.shape[:-1], bool))
        return jnp.einsum("dpc,lc->dpl", unit, variables["weights"], precision="highest") + variables["bias"]


class Images(NamedTuple):
    """How prototype images are read."""

    size: tuple[int, int]  # rows, columns
    antialias: bool
    seed: int  # of the frames' cameras
    dtype: str = "uint8"

    def resized(self, image: np.ndarray) -> np.ndarray:
        return resize_image(image, self.size, antialias=self.antialias, dtype=self.dtype)


def fit_logistic(features: np.ndarray, labels: np.ndarray, num_classes: int, strength: float) -> tuple:
    """Weights [classes, C] and biases [classes] float32 of a logistic regression of one class against the rest.

    For class k, y = +1 for its n_k samples and -1 for the others, minimises

        |w|^2 / 2 + b^2 / 2 + strength * sum c_i log(1 + exp(-y_i (w x_i + b))),  c_i = n / (classes n_k) or 1

    over the n samples: scikit-learn's LogisticRegression(class_weight="balanced", solver="liblinear", C=strength),
    which IGLOSS uses; so the bias is regularised too, and only the positive samples are balanced. A class without a
    sample gets bias -inf. features [n, C], labels [n] integers.
    """
    import scipy.optimize
    import scipy.special

    x = np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)
    weights, biases = np.zeros((num_classes, features.shape[1])), np.full(num_classes, -np.inf)
    present = np.unique(labels)
    for k in present:
        sign = np.where(labels == k, 1.0, -1.0)
        cost = strength * np.where(labels == k, len(labels) / (len(present) * (labels == k).sum()), 1.0)

        def loss(w: np.ndarray, sign=sign, cost=cost) -> tuple[float, np.ndarray]:
            margin = sign * (x @ w)
            slope = -sign * cost * scipy.special.expit(-margin)
            return float(0.5 * w @ w + cost @ np.logaddexp(0.0, -margin)), w + slope @ x

        options = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-8}
        found = scipy.optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options=options)
        weights[k], biases[k] = found.x[:-1], found.x[-1]
    return weights.astype(np.float32), biases.astype(np.float32)


def zero_shot(
    probe: ProbeSettings,
    student: Student,
    teacher: tuple[Source, Teacher],
    dataset: Dataset,
    variables: Variables,
    images: Images,
) -> tuple[ZeroShot, dict]:
    """The classifier of `config.probe` and its variables, from a student with its distillation head, the `teacher`
    that it was distilled from, and the training frames. Raises `InputError` for prototypes that cannot be read."""
    features, labels = gather_prototypes(probe.prototypes, dataset, teacher, images)
    num_classes = len(dataset.class_names)
    counts = np.bincount(labels, minlength=num_classes)
    missing = [name for name, count in zip(dataset.class_names, counts, strict=True) if not count]
    if jax.process_index() == 0:
        print(f"zero_shot: {len(labels)} prototypes of {num_classes - len(missing)} classes", flush=True)
        if missing:
            print(f"zero_shot: none of {', '.join(missing)}; never predicted", flush=True)
    weights, bias = fit_logistic(features, labels, num_classes, probe.inverse_regularization)
    return ZeroShot(student), {"student": variables, "weights": weights, "bias": bias}


def gather_prototypes(
    prototypes: str, dataset: Dataset, teacher: tuple[Source, Teacher], images: Images
) -> tuple[np.ndarray, np.ndarray]:
    """Unit prototypes [n, C_teacher] float32, normalised as the student's features are, and their classes [n]. Every
    process computes them all.

    Raises `InputError` when there is none.
    """
    source, arrays = teacher
    if prototypes:
        images = images._replace(size=(images.size[0], images.size[0]))

    @jax.jit
    def tokens_of(image: Array) -> Array:
        return tokens_of_images(source, arrays, image[None])

    if prototypes:
        found = list(_from_folder(Path(prototypes), dataset.class_names, images, tokens_of))
    else:
        found = list(_from_labels(dataset, images, tokens_of))
        if not found:
            raise InputError(
                f"none of the {len(dataset)} training images shows a labelled point; check data.root's labels, or give "
                "a folder of prototype images by class, --config.probe.prototypes=DIR"
            )
    features = np.stack([feature for feature, _ in found])
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return features, np.array([label for _, label in found])


def _from_folder(
    folder: Path, names: Sequence[str], images: Images, tokens_of: Callable[..., Array]
) -> Iterator[tuple[np.ndarray, int]]:
    """One prototype an image of `folder/<name of the class>/`, or `folder/<number>_<name>/` as IGLOSS has them."""
    mean_of = jax.jit(lambda tokens: mean_unit_feature(tokens, images.size))
    for path, label in find_images(folder, names):
        try:
            image = files.read_image(path)
        except BadFrameError as error:
            raise InputError(str(error)) from None
        yield np.asarray(mean_of(tokens_of(images.resized(image)))), label


def find_images(folder: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """The images of each class and its number. Raises `InputError` for folders of no class, or without any image."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; probe.prototypes is one with a folder of images for each class")
    number = {_plain(name): k for k, name in enumerate(names)}
    found, unknown = [], []
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        label = number.get(_plain(child.name), number.get(_plain(re.sub(r"^\d+[_-]", "", child.name))))
        if label is None:
            unknown.append(child.name)
            continue
        found += [(path, label) for path in sorted(child.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    if unknown or not found:
        what = f"{', '.join(unknown[:5])} are no classes" if unknown else "it holds no image of a class"
        raise InputError(f"{folder}: {what}; name its folders after the classes {', '.join(names)}")
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())


def mean_unit_feature(tokens: Array, size: tuple[int, int]) -> Array:
    """Mean over all pixels of the unit feature, the token grid [1, th, tw, C] upsampled to `size` row by row: [C]."""
    h, w = size

    def one_row(row: Array) -> Array:
        pixels = jnp.stack([jnp.full(w, row), jnp.arange(w)], axis=1)
        feature = sample_tokens(tokens.astype(jnp.float32), jnp.zeros(w, jnp.int32), pixels, size)
        return normalize(feature, jnp.ones(w, bool)).mean(axis=0)

    return jax.lax.map(one_row, jnp.arange(h)).mean(axis=0)


def _from_labels(dataset: Dataset, images: Images, tokens_of: Callable[..., Array]) -> Iterator[tuple[np.ndarray, int]]:
    """One prototype for each training image and class in it, over the pixels of the class's points."""

    @jax.jit
    def unit_features(tokens: Array, pixels: Array) -> Array:
        feature = sample_tokens(tokens.astype(jnp.float32), jnp.zeros(len(pixels), jnp.int32), pixels, images.size)
        return normalize(feature, jnp.ones(len(pixels), bool))

    bad = 0
    for index in range(len(dataset)):
        try:
            frame = dataset.frame(index, np.random.default_rng((images.seed, 2, index)))
            check_classes(frame, len(dataset.class_names))
        except BadFrameError as error:
            bad += 1
            if too_many_bad(bad, len(dataset)):
                raise InputError(
                    f"{bad} of {len(dataset)} frames are bad, more than 1 %; the last one: {error}"
                ) from None
            continue
        if frame.image is None or frame.pixels is None or frame.visible is None or frame.labels is None:
            raise InputError(
                f"{frame.name} has no image beside its labels, as datasets that are read for probing have none; give "
                "a folder of prototype images by class, --config.probe.prototypes=DIR"
            )
        seen = frame.visible & (frame.labels != IGNORE)
        ratio = np.array(images.size) / np.array(frame.image_shape or frame.image.shape[:2])
        pixels = np.floor(np.floor(frame.pixels[seen]) * ratio).astype(np.int32)
        number = 1 << max(10, int(seen.sum() - 1).bit_length())  # few sizes, few programs
        padded = np.zeros((number, 2), np.int32)
        padded[: len(pixels)] = pixels
        features = np.asarray(unit_features(tokens_of(images.resized(frame.image)), padded))[: len(pixels)]
        for label in np.unique(frame.labels[seen]):
            yield features[frame.labels[seen] == label].mean(axis=0), int(label)
