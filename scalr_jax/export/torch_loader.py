"""The student of model.pth with PyTorch alone, run on example.npz: python run.py

`student(feats, neighbors, cells)` gives features [N, C] and the head's rows. feats [N, F], neighbors [N, K] and, for
each of the planes xy, xz, yz, cells [N], row * columns + column in its grid (`scalr_jax.export.inputs.make_inputs`
makes them of points, in NumPy).
"""

import json
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

folder = Path(__file__).resolve().parent
settings = json.loads((folder / "config.json").read_text())["settings"]
(content,) = torch.load(folder / "model.pth", weights_only=True).values()
weights = {name.removeprefix("module."): value for name, value in content.items()}
activation = {"relu": F.relu, "gelu": F.gelu}[settings["activation"]]


def norm(x, name):
    """Batch norm in inference, or layer norm, of rows [N, C]."""
    scale, shift, mean = (weights.get(f"{name}.{part}") for part in ("weight", "bias", "running_mean"))
    if mean is not None:
        return F.batch_norm(x, mean, weights[f"{name}.running_var"], scale, shift)
    return F.layer_norm(x, x.shape[-1:], scale, shift)


def linear(x, name):
    """A convolution of size 1, on rows [N, C]."""
    return F.linear(x, weights[f"{name}.weight"].flatten(1), weights.get(f"{name}.bias"))


def embed(feats, neighbors):
    x = norm(feats, "embed.norm")
    offsets = norm((x[neighbors] - x[:, None]).flatten(0, 1), "embed.conv2.0")  # [N * K, F]
    offsets = linear(F.relu(norm(linear(offsets, "embed.conv2.1"), "embed.conv2.2")), "embed.conv2.4")
    return linear(
        torch.cat([linear(x, "embed.conv1"), offsets.unflatten(0, neighbors.shape).amax(1)], 1), "embed.final"
    )


def spatial_mix(x, name, cell, grid):
    """x + scale * inflate(conv(activation(conv(flatten(norm(x))))))"""
    size = grid[0] * grid[1]
    count = torch.bincount(cell, minlength=size) + 1e-6
    table = torch.zeros(size, x.shape[1]).index_add(0, cell, norm(x, f"{name}.norm")) / count[:, None]
    image = table.T.reshape(1, -1, *grid)
    for k in (0, 2):
        kernel, bias = weights[f"{name}.ffn.{k}.weight"], weights[f"{name}.ffn.{k}.bias"]
        image = F.conv2d(activation(image) if k else image, kernel, bias, padding=1, groups=len(kernel))
    return x + weights[f"{name}.scale.weight"].flatten() * image.flatten(2)[0].T[cell]


def channel_mix(x, name):
    hidden = activation(linear(norm(x, f"{name}.norm"), f"{name}.mlp.0"))
    return x + weights[f"{name}.scale.weight"].flatten() * linear(hidden, f"{name}.mlp.2")


def head(x):
    names = sorted({name.rpartition(".")[0] for name in weights if name.startswith("classif")})
    for name in names:
        is_norm = weights[f"{name}.weight"].ndim == 1
        x = norm(x, name) if is_norm else linear(x, name)
        x = x if is_norm or name == names[-1] else F.relu(x)
    return x


@torch.no_grad()
def student(feats, neighbors, cells):
    x = embed(feats, neighbors)
    for d in range(settings["depth"]):
        plane = d % 3
        x = spatial_mix(x, f"waffleiron.spatial_mix.{d}", cells[plane], settings["grids"][plane])
        x = channel_mix(x, f"waffleiron.channel_mix.{d}")
    return x, head(x)


example = {name: torch.from_numpy(array) for name, array in np.load(folder / "example.npz").items()}
cells = [example[f"cell_{plane}"].long() for plane in ("xy", "xz", "yz")]
features, rows = student(example["feats"], example["neighbors"].long(), cells)
print(f"{features.shape=} {rows.shape=}, largest difference {(features - example['output/features']).abs().max():.1e}")
