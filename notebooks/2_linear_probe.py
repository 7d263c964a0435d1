# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A linear probe
#
# How much do frozen features know of classes? A linear classifier is fitted on them, on the same student with random
# weights, and on the bare coordinates and intensity; all three are compared on streets that nothing was fitted on.
# About a minute on a CPU.

# %% [markdown]
# This cell installs the package where it is missing: from the clone that the notebook lies in, else (on Colab) from
# `REPOSITORY`. What runs the accelerator, JAX and its plugins, stays as it is.

# %%
import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REPOSITORY = ""
if importlib.util.find_spec("scalr_jax") is None:
    clone = next((folder.resolve() for folder in map(Path, (".", "..")) if (folder / "scalr_jax").is_dir()), None)
    source = f"{clone}[notebooks]" if clone else f"scalr_jax[notebooks] @ git+{REPOSITORY}"
    if not (clone or REPOSITORY):
        raise SystemExit("write the address of the package's repository into REPOSITORY, and run this cell again")
    kept = {d.name: d.version for d in metadata.distributions() if d.name.startswith(("jax", "libtpu"))}
    Path("constraints.txt").write_text("".join(f"{name}=={version}\n" for name, version in kept.items()))
    if subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", "constraints.txt", source]).returncode:
        raise SystemExit(f"pip cannot install scalr_jax beside {kept or 'what is here'}: it needs JAX 0.10 or newer")
if "google.colab" in sys.modules:
    import jax

    if jax.default_backend() == "cpu":
        print("no accelerator: choose one in Runtime, Change runtime type; on the CPU this notebook takes minutes")

# %% [markdown]
# The student of `1_features.ipynb`; if it is not there, it is distilled now. The teacher never saw a class.

# %%
from pathlib import Path

from scalr_jax.config import get_config

config = get_config()
config.num_steps = 100
config.data.update(dataset="streets", num_scenes=48, image_size=(112, 224), num_workers=0)
config.data.update(points_per_shard=4_800, scenes_per_shard=2)
config.model.update(channels=32, depth=3, num_neighbors=8, head_hidden=128)
config.model.update(grids=((128, 128), (128, 16), (128, 16)))
config.teacher.checkpoint = "demo"
config.optimizer.update(learning_rate=2.5e-2, beta2=0.99, warmup_share=0.1)

# %% [markdown]
# A workdir that is finished is not trained again.

# %%
from scalr_jax import main

workdir = Path("runs/notebooks/distill")
if not (workdir / "results.json").exists():
    main.run(config, workdir)

# %% [markdown]
# Two students: the distilled one, and the same one with random weights.

# %%
import jax
import scalr_jax
from scalr_jax.interop.model import empty_batch

distilled = scalr_jax.load(workdir)
student = distilled.student
init = jax.jit(lambda key, batch: student.init(key, batch, train=False))
batch = empty_batch(distilled.config.num_features, student.needs)
random = scalr_jax.Model(distilled.config, init(jax.random.key(0), batch))

# %% [markdown]
# Labelled streets: 16 to fit the probe on, 6 to compare with.

# %%
from scalr_jax.data.streets.streets import Streets

train = Streets(workdir / "streets", split="train", num_scenes=16)
validation = Streets(workdir / "streets", split="validation", num_scenes=6)
for streets in (train, validation):
    streets.render_missing()

# %% [markdown]
# Cache the features: the student is frozen, so each scan goes through it once, however often the probe is fitted.
# Compiled programs are kept as well, as the commands do: both students are one program with other weights.

# %%
import numpy as np
from scalr_jax.runtime.command_line import use_cache

use_cache()


def cached_features(name, function, streets):
    """Features [N, C] of all points of all streets, and their labels [N]; kept in a file."""
    path = Path(f"runs/notebooks/{name}_{streets.split}.npz")
    if not path.exists():
        frames = [streets.frame(index) for index in range(len(streets))]
        features = np.concatenate([function(frame.points) for frame in frames])
        np.savez(path, features=features, labels=np.concatenate([frame.labels for frame in frames]))
    with np.load(path) as arrays:
        return arrays["features"], arrays["labels"]


inputs = {"coordinates": lambda points: points, "random": random.embed, "distilled": distilled.embed}
cache = {name: [cached_features(name, f, s) for s in (train, validation)] for name, f in inputs.items()}
{name: features.shape for name, ((features, _), _) in cache.items()}

# %% [markdown]
# The probe: logistic regression on standardised features, all points at once, 300 steps of Adam.

# %%
import jax.numpy as jnp
import optax

num_classes = len(train.class_names)


@jax.jit
def fit(features, labels):
    """A weight matrix [C + 1, classes]; the last row is the bias."""
    rows = jnp.pad(features, ((0, 0), (0, 1)), constant_values=1.0)
    optimizer = optax.adam(0.05)

    def loss(weights):
        return optax.softmax_cross_entropy_with_integer_labels(rows @ weights, labels).mean()

    def step(carry, _):
        weights, state = carry
        updates, state = optimizer.update(jax.grad(loss)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    weights = jnp.zeros((rows.shape[1], num_classes))
    (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), None, length=300)
    return weights


# %% [markdown]
# Fit on every fifth training point, predict every validation point.

# %%
predictions = {}
for name, ((features, labels), (unseen, _)) in cache.items():
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    weights = np.asarray(fit((features[::5] - mean) / deviation, labels[::5].astype(np.int32)))
    predictions[name] = ((unseen - mean) / deviation @ weights[:-1] + weights[-1]).argmax(axis=1)

# %% [markdown]
# The table: intersection over union of each class, in percent, and the mean.

# %%
from IPython.display import Markdown
from scalr_jax.evaluation.report import confusion_matrix, intersection_over_union

truth = cache["distilled"][1][1]
iou = {name: intersection_over_union(confusion_matrix(truth, rows, num_classes)) for name, rows in predictions.items()}
miou = {name: np.nanmean(values) for name, values in iou.items()}
lines = [f"| features | {' | '.join(train.class_names)} | mean |", "| --- " * (num_classes + 2) + "|"]
for name, values in iou.items():
    cells = " | ".join(f"{100 * value:.0f}" for value in values)
    lines.append(f"| {name} | {cells} | **{100 * miou[name]:.1f}** |")
Markdown("\n".join(lines))

# %% [markdown]
# The same as a picture.

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
for k, (name, values) in enumerate(iou.items()):
    axes.bar(np.arange(num_classes) + 0.27 * (k - 1), 100 * values, 0.25, label=f"{name}: {100 * miou[name]:.1f}")
axes.set_xticks(range(num_classes), train.class_names, rotation=30)
axes.set_ylabel("IoU (%)")
axes.legend(title="mean IoU (%)")
plt.show()

# %% [markdown]
# One unseen street: what the probe on distilled features says, the labels, and where both differ.

# %%
from IPython.display import Image
from scalr_jax.figures.pictures import draw_predictions

frame, names = validation.frame(0), train.class_names
rows = predictions["distilled"][: len(frame.points)]
picture = Path("runs/notebooks/prediction.png")
title = f"classes of {frame.name}"
draw_predictions(picture, frame.points[:, :3], title, rows, names, labels=frame.labels, label_names=names)
Image(picture, width=1200)

# %% [markdown]
# For real datasets `python -m scalr_jax.main --config=configs/demo.py --config.task=probe` and the configs of
# `configs/probe/` do this with packed scenes, on any number of devices, and `--config.probe.features=cached` keeps
# the features in files.
