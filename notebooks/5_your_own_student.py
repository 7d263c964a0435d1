# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Your own student, from cached tokens
#
# A teacher gives the same features for the same image in every epoch. Here they are computed once and kept, and a
# student of your own choice learns from the files: no teacher in the step, no image in the loader. Any model can be
# the teacher that way, also one that does not run in JAX (`docs/tokens.md`). About a minute on a CPU, most of which is
# compilation.

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
# Streets with images. Of a real dataset this would be `data.root`, or a folder of your own (`3_your_own_lidar.ipynb`).

# %%
from pathlib import Path

from scalr_jax.data.streets.streets import Streets

size, root = (112, 224), Path("runs/notebooks/distill/streets")
streets = Streets(root, split="train", num_scenes=16, image_size=size)
streets.render_missing()

# %% [markdown]
# Compute the tokens once: `python -m scalr_jax.prepare --teacher=demo --image_size=112,224 --dataset=streets
# --root=STREETS --num_scenes=16 --output=TOKENS`. For a real teacher give its file, as `dinov2_vits14_pretrain.pth`.

# %%
from scalr_jax.prepare.run import run

tokens = Path("runs/notebooks/tokens")
if not (tokens / "tokens.json").exists():
    source = ["--dataset=streets", f"--root={root}", "--num_scenes=16", "--image_size=112,224", "--split=train"]
    run(["prepare", "--teacher=demo", *source, f"--output={tokens}"])

# %% [markdown]
# Look at one: a token is a vector for a patch of the image, and patches of like things have like vectors.

# %%
import matplotlib.pyplot as plt
import numpy as np
from scalr_jax.data.tokens.store import TokenStore
from scalr_jax.figures.colors import color_by_axes, fit_color_axes
from scalr_jax.ops.tokens import decode

store, frame = TokenStore(tokens), streets.frame(0)
file, row = store.rows[frame.name]
vectors = np.asarray(decode(*store.files[file].read(row)))
plane = vectors.reshape(-1, vectors.shape[-1])
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.7), layout="constrained")
left.imshow(frame.image)
right.imshow(color_by_axes(plane, fit_color_axes(plane)).reshape(*vectors.shape[:2], 3))
for axes in (left, right):
    axes.set_axis_off()
plt.show()

# %% [markdown]
# Your student: any backbone (`waffleiron`, `minkunet14` to `34`, `vavit_tiny` to `g`) of any size. This one is a
# WaffleIron of one layer. Of your own making it can be as well: `docs/design.md`, "How to add a backbone".

# %%
from scalr_jax.config import get_config

config = get_config()
config.num_steps = 50
config.data.update(dataset="streets", root=str(root), num_scenes=16, image_size=size, num_workers=0)
config.data.update(points_per_shard=4_800, scenes_per_shard=2)
config.model.update(name="waffleiron", channels=48, depth=1, num_neighbors=8)
config.model.update(grids=((128, 128), (128, 16), (128, 16)))
config.teacher.cache = str(tokens)
config.optimizer.update(learning_rate=2.5e-2, beta2=0.99, warmup_share=0.1)
config.mesh.data = 1  # one accelerator, also where there are several

# %% [markdown]
# Distil. Progress tells points a second and, on an accelerator, the share of its peak that the model uses (MFU).

# %%
import json

from scalr_jax import main

workdir = Path("runs/notebooks/own_student")
if not (workdir / "results.json").exists():
    main.run(config, workdir)
results = json.loads((workdir / "results.json").read_text())
print(f"{results['train/examples_per_s']:.1f} scenes/s, loss {results['train/loss']:.3f}")

# %% [markdown]
# The loss, beside that of the best constant prediction: below it the student knows more than the mean feature.

# %%
from scalr_jax.figures.charts import read_curve

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(*read_curve(workdir, "train/loss"), label="student")
axes.plot(*read_curve(workdir, "train/loss_constant"), "--", color="0.4", label="best constant prediction")
axes.set(xlabel="step", ylabel="distillation loss")
axes.legend()
plt.show()

# %% [markdown]
# What it makes of a street that it has not seen, from above: like colours are like features.

# %%
import scalr_jax
from IPython.display import Image
from scalr_jax.figures.pictures import Panel, draw_panels

model = scalr_jax.load(workdir)
unseen = Streets(root, split="validation", num_scenes=1)
unseen.render_missing()
points = unseen.frame(0).points
features = model.distilled(points)
panel = Panel("", color_by_axes(features, fit_color_axes(features)))
draw_panels(Path("runs/notebooks/own_student.png"), points[:, :3], "An unseen street, by your student", [panel])
Image("runs/notebooks/own_student.png", width=600)

# %% [markdown]
# From here: more streets or your own recordings, DINOv2 as the teacher, more steps, and a probe
# (`2_linear_probe.ipynb`) that says in numbers what the student knows.
