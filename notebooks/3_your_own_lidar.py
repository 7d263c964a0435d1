# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Your own lidar
#
# From a folder of scans and photographs to a student of your own: lay the folder out, look at it, distil a little,
# predict. Generated streets play the part of your recordings. About a minute on a CPU.

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
# Recordings: a lidar that looks ahead, 1.9 m above the ground, and one camera. Replace this cell by your own files.

# %%
from pathlib import Path

from scalr_jax.data.streets.streets import Streets

recordings = Streets(
    "runs/notebooks/recordings", split="train", num_scenes=16, sensors=["solid"], image_size=(224, 448)
)
recordings.render_missing()

# %% [markdown]
# The layout: a folder a drive, in it `scans/` and a folder a camera, with the same name for what was taken together.

# %%
import PIL.Image

root = Path("runs/notebooks/mine")
for index in range(len(recordings)):
    frame, drive, name = recordings.frame(index), root / f"drive_{index // 8}", f"{index:06d}"
    for folder in ("scans", "front"):
        (drive / folder).mkdir(parents=True, exist_ok=True)
    frame.points.tofile(drive / "scans" / f"{name}.bin")  # float32 rows: x, y, z, intensity
    PIL.Image.fromarray(frame.image).save(drive / "front" / f"{name}.png")
sorted(str(path.relative_to(root)) for path in root.glob("*/*/000000.*"))

# %% [markdown]
# The calibration: `intrinsics` in pixels, and the 4 x 4 matrix that takes a point of the lidar's frame (x forward, y
# left, z up) to the camera's (x right, y down, z forward). `docs/data.md` lists the traps.

# %%
import json

import numpy as np
from scalr_jax.data.streets import sensors

axes, position = sensors.camera_pose(0)
lidar_to_camera = np.eye(4)
lidar_to_camera[:3, :3], lidar_to_camera[:3, 3] = axes, -axes @ position
focal = float(sensors.focal_length((224, 448)))
camera = {
    "size": [448, 224],
    "intrinsics": [[focal, 0, 223.5], [0, focal, 111.5], [0, 0, 1]],
    "lidar_to_camera": lidar_to_camera.tolist(),
}
settings = {"columns": 4, "sensor_height": 1.9, "intensity": [39.6, 28.9], "cameras": {"front": camera}}
(root / "dataset.json").write_text(json.dumps(settings, indent=2))
lidar_to_camera.round(2)

# %% [markdown]
# Inspect before you train. This is `python -m scalr_jax.prepare --dataset=folder --root=DIR --output=inspection
# --inspect`.

# %%
from scalr_jax.data.readers.folder import Folder
from scalr_jax.prepare.inspect import inspect_dataset

report = inspect_dataset(Folder(root, split="all"), Path("runs/notebooks/inspection"), num_frames=16)

# %% [markdown]
# The points over the image: the edges of near things must lie on the edges in the picture, else the calibration is
# wrong.

# %%
from IPython.display import Image

Image("runs/notebooks/inspection/over_front_0.png", width=900)

# %% [markdown]
# A config, with the field of view and grids that the inspection found to fit. For a real result take DINOv2 as the
# teacher, `config.teacher.checkpoint = "dinov2_vits14_pretrain.pth"`, a larger student and many more steps.

# %%
from scalr_jax.config import get_config

config = get_config()
config.num_steps = 60
config.data.update(dataset="folder", root=str(root), image_size=(112, 224), num_workers=0)
config.data.update(points_per_shard=8_192, scenes_per_shard=2, max_points=4_000)
config.model.update(channels=32, depth=3, num_neighbors=8, head_hidden=128)
config.model.update({key: report["suggestion"][key] for key in ("field_of_view", "grids")})
config.teacher.checkpoint = "demo"
config.optimizer.update(learning_rate=2.5e-2, beta2=0.99, warmup_share=0.1)

# %% [markdown]
# Distil a little.

# %%
from scalr_jax import main

workdir = Path("runs/notebooks/mine_distilled")
if not (workdir / "results.json").exists():
    main.run(config, workdir)

# %% [markdown]
# Predict: features of every point of every scan of a folder, in files and as pictures, by the flags of the command
# `python -m scalr_jax.predict`. Your lidar's intensities are your own, so it is told the numbers of `dataset.json`.

# %%
from scalr_jax.predict.run import run

scans = ["--input=runs/notebooks/mine/drive_1/scans", "--intensity=39.6,28.9"]
output = ["--output=runs/notebooks/predictions", "--formats=npz,png", "--overwrite", "--cache=none"]
run(["predict", "--model=runs/notebooks/mine_distilled", *scans, *output])

# %% [markdown]
# One of the pictures: like colours are like features.

# %%
Image("runs/notebooks/predictions/000008.png", width=600)

# %% [markdown]
# And one of the files: a row for each point of the scan, in its order.

# %%
with np.load("runs/notebooks/predictions/000008.npz") as arrays:
    features = arrays["features"]
features.shape, recordings.frame(8).points.shape

# %% [markdown]
# From here: labels for some scans let you fit a probe (`2_linear_probe.ipynb`, `docs/data.md`), and `python -m
# scalr_jax.visualize` draws the scan with its image.
