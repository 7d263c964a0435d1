# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Features of lidar points
#
# A student is distilled, loaded and asked for the features of a scan that it has never seen: as colours, and by their
# similarity to one point. Everything is generated, nothing is downloaded; on a CPU it takes about a minute.

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
# A config says everything about a run: 48 generated streets, a student of 3 layers, 32 wide, the teacher that comes
# with the package, 100 steps. That is little: `configs/demo.py` takes eight minutes and learns more.

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
# Distil: the student learns to predict the teacher's feature at the pixel of each point. `constant` is the loss of
# the best constant prediction; a workdir that is finished is not trained again.

# %%
from scalr_jax import main

workdir = Path("runs/notebooks/distill")
if not (workdir / "results.json").exists():
    main.run(config, workdir)

# %% [markdown]
# Load it. A workdir knows its settings; a published file needs to be told its sensor, `scalr_jax.load("WI_768.pth",
# sensor="nuscenes")`.

# %%
import scalr_jax

model = scalr_jax.load(workdir)
print(f"{model.config.depth} layers, {model.config.channels} wide, mean intensity {model.config.intensity[0]}")

# %% [markdown]
# A scan is an array [N, 4]: x, y, z in metres and the raw intensity. This one is from a street that was not trained
# on, seen by a lidar of 32 beams and by a camera.

# %%
import PIL.Image
from scalr_jax.data.streets.streets import Streets

streets = Streets(workdir / "streets", split="validation", num_scenes=4, image_size=(224, 448))
streets.render_missing()
frame = streets.frame(2)
print(f"{len(frame.points):,} points, of which the camera sees {frame.visible.sum():,}; the first: {frame.points[0]}")
PIL.Image.fromarray(frame.image)

# %% [markdown]
# Does the scan fit what the model was trained on? Each sentence would name something that does not.

# %%
model.check(frame.points)

# %% [markdown]
# Embed: every point gets a feature of the backbone, and one in the teacher's space.

# %%
features = model.embed(frame.points)
distilled = model.distilled(frame.points)
features.shape, distilled.shape

# %% [markdown]
# Principal components as colours: points whose features are alike have like colours. Nobody told the student what a
# car or a tree is.

# %%
from IPython.display import Image
from scalr_jax.figures.colors import color_by_axes, cosine_similarity, fit_color_axes
from scalr_jax.figures.pictures import Panel, draw_with_image

colors = color_by_axes(distilled, fit_color_axes(distilled))
xyz = frame.points[:, :3]
seen = (frame.image, frame.pixels, frame.visible)
panel = Panel("three principal components", colors)
draw_with_image(Path("runs/notebooks/pca.png"), xyz, "Features of an unseen street", panel, *seen)
Image("runs/notebooks/pca.png", width=900)

# %% [markdown]
# Similarity to one point, the star: the point on a car that is most like all points of cars in view. Red is most alike.
# A student this small, taught for this short, takes some people and fences for cars: see `streets.frame(4)`.

# %%
import numpy as np

car = streets.class_names.index("car")
cars = np.flatnonzero((frame.labels == car) & frame.visible)
query = cars[cosine_similarity(np.vstack([distilled[cars].mean(axis=0), distilled[cars]]), 0)[1:].argmax()]
similarity = cosine_similarity(distilled, query)
panel = Panel("one point on a car", similarity, label="cosine similarity to the star")
draw_with_image(Path("runs/notebooks/car.png"), xyz, "Similarity to one point", panel, *seen, query=query)
Image("runs/notebooks/car.png", width=900)

# %% [markdown]
# The same in numbers: the mean similarity of the points of each class to that point.

# %%
from IPython.display import Markdown

present = [k for k in np.unique(frame.labels) if (frame.labels == k).sum() >= 20]
mean = {streets.class_names[k]: float(similarity[frame.labels == k].mean()) for k in present}
rows = [f"| {name} | {value:.2f} |" for name, value in sorted(mean.items(), key=lambda item: -item[1])]
Markdown("\n".join(["| class | mean similarity |", "| --- | --- |", *rows]))

# %% [markdown]
# All of these pictures and an interactive viewer come from one command, for any scan: `python -m scalr_jax.visualize
# --model=runs/notebooks/distill --output=pictures`.
