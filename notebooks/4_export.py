# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Exporting a model
#
# A student as an ONNX graph, as a StableHLO program and as plain weights; each is checked against the original before
# it is written, and here once more. About a minute on a CPU. `docs/export.md` says what each format is for.

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
# The student of `1_features.ipynb`; if it is not there, it is distilled now.

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
# The original, and its features for a scan that it has not seen.

# %%
import scalr_jax
from scalr_jax.data.streets.streets import Streets

model = scalr_jax.load(workdir)
streets = Streets(workdir / "streets", split="validation", num_scenes=1)
streets.render_missing()
points = streets.frame(0).points
wanted = model.embed(points)
wanted.shape

# %% [markdown]
# Export to ONNX. `folded` puts norms and layer scales into the matrices beside them; the number is the largest
# difference to the original, of the largest value.

# %%
from scalr_jax.export.run import export_model

folder = Path("runs/notebooks/onnx")
difference = export_model(model, "onnx", folder, folded=True, source=workdir, overwrite=True)
print(f"{difference:.1e}")
{path.name: path.stat().st_size for path in sorted(folder.iterdir())}

# %% [markdown]
# Run it in onnxruntime. `make_inputs` finds voxels, neighbours and cells in NumPy; `nearest` says which row of the
# output is each point's.

# %%
import json

import numpy as np
import onnxruntime
from scalr_jax.export.inputs import make_inputs, pad_inputs

settings = json.loads((folder / "config.json").read_text())["settings"]
session = onnxruntime.InferenceSession(folder / "model.onnx")
inputs, nearest = make_inputs(points, settings)
(rows,) = session.run(["features"], inputs)
onnx_features = rows[nearest]
print(f"largest difference {np.abs(onnx_features - wanted).max():.1e}, largest value {np.abs(wanted).max():.1f}")

# %% [markdown]
# The features that came out of onnxruntime, as colours.

# %%
from IPython.display import Image
from scalr_jax.figures.colors import color_by_axes, fit_color_axes
from scalr_jax.figures.pictures import Panel, draw_panels

colors = color_by_axes(onnx_features, fit_color_axes(onnx_features))
title = "Features from onnxruntime, as colours"
draw_panels(Path("runs/notebooks/onnx.png"), points[:, :3], title, [Panel("", colors)])
Image("runs/notebooks/onnx.png", width=600)

# %% [markdown]
# Export to StableHLO: one program for CPU, CUDA and TPU, with its weights beside it.

# %%
folder = Path("runs/notebooks/stablehlo")
difference = export_model(model, "stablehlo", folder, source=workdir, overwrite=True)
print(f"{difference:.1e}")
{path.name: path.stat().st_size for path in sorted(folder.iterdir())}

# %% [markdown]
# Load it back, with JAX alone. Inputs are padded to a size of a short list, since each size is compiled once.

# %%
import jax
import jax.export

program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
weights = dict(np.load(folder / "weights.npz"))
settings = json.loads((folder / "config.json").read_text())["settings"]
inputs, nearest = make_inputs(points, settings)
outputs = jax.jit(program.call)(weights, pad_inputs(inputs, settings))
stablehlo_features = np.asarray(outputs["features"])[nearest]
print(f"{program.platforms}: largest difference {np.abs(stablehlo_features - wanted).max():.1e}")

# %% [markdown]
# Export the weights alone. Such a folder is a model again: `scalr_jax.load` reads it, and PyTorch reads the names.

# %%
export_model(model, "safetensors", Path("runs/notebooks/weights"), source=workdir, overwrite=True)
again = scalr_jax.load("runs/notebooks/weights")
print(f"largest difference {np.abs(again.embed(points) - wanted).max():.1e}")

# %% [markdown]
# Every export carries a model card: how to run it, its settings, training data, licence and metrics.

# %%
from IPython.display import Markdown

Markdown((folder / "README.md").read_text())
