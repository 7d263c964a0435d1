"""A ViT said once more in NumPy, float64, with the names of Meta's files; and such files, with random numbers.

Nothing here uses scalr_jax, so that agreement means something: patches are cut in loops, positions interpolated pixel
by pixel as PyTorch's `interpolate` defines it, attention written out a head at a time.
"""

import math

import numpy as np
from scipy.special import erf

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
KINDS = ("dino", "dinov2", "dinov2_registers", "dinov2_giant", "dinov3", "dinov3_plus", "dinov3_7b")


def random_weights(kind, *, width=128, depth=2, hidden=96, table=5, seed=0):
    """A state dict of Meta's for one of KINDS."""
    rng = np.random.default_rng(seed)
    patch = 16 if kind.startswith("dinov3") else 14
    gated = kind in ("dinov2_giant", "dinov3_plus", "dinov3_7b")

    def normal(*shape, scale=None):
        scale = scale or 1 / math.sqrt(math.prod(shape[1:]) or 1)
        return rng.normal(0, scale, shape).astype(np.float32)

    weights = {"cls_token": normal(1, 1, width, scale=0.5)}
    if kind != "dino":
        weights["mask_token"] = normal(1, width)
    if not kind.startswith("dinov3"):
        weights["pos_embed"] = normal(1, 1 + table * table, width, scale=0.3)
    if kind == "dinov2_registers":
        weights["register_tokens"] = normal(1, 4, width, scale=0.5)
    if kind.startswith("dinov3"):
        head = width if kind == "dinov3_7b" else 64
        periods = 100.0 ** (np.arange(head // 4) / (head // 4))
        weights["storage_tokens"] = normal(1, 4, width, scale=0.5)
        weights["rope_embed.periods"] = (periods * (1 + 1e-3 * rng.normal(size=head // 4))).astype(np.float32)
    sizes = {"patch_embed.proj": (width, 3, patch, patch)}
    for n in range(depth):
        block = f"blocks.{n}"
        sizes |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        if not gated:
            sizes |= {f"{block}.mlp.fc1": (hidden, width), f"{block}.mlp.fc2": (width, hidden)}
        elif kind == "dinov2_giant":
            sizes |= {f"{block}.mlp.w12": (2 * hidden, width), f"{block}.mlp.w3": (width, hidden)}
        else:
            sizes |= {f"{block}.mlp.w{i}": (hidden, width) for i in (1, 2)} | {f"{block}.mlp.w3": (width, hidden)}
        for norm in ("norm1", "norm2"):
            weights |= {f"{block}.{norm}.weight": 1 + normal(width) / 5, f"{block}.{norm}.bias": normal(width) / 5}
        if kind != "dino":
            weights |= {f"{block}.ls{i}.gamma": 0.5 + normal(width) / 5 for i in (1, 2)}
    weights |= {f"{name}.weight": normal(*shape) for name, shape in sizes.items()}
    weights |= {f"{name}.bias": normal(shape[0]) / 5 for name, shape in sizes.items()}
    for name in [name for name in weights if name.endswith("qkv.bias") and kind.startswith("dinov3")]:
        weights[name + "_mask"] = np.repeat(np.array([1, 0, 1], np.float32), width)
        if kind == "dinov3_7b":
            del weights[name], weights[name + "_mask"]
    weights |= {"norm.weight": 1 + normal(width) / 5, "norm.bias": normal(width) / 5}
    if kind == "dinov3_7b":
        weights |= {"local_cls_norm.weight": normal(width), "local_cls_norm.bias": normal(width)}
    return weights


def forward(weights, images, *, num_heads, interpolation="dinov2", gate="silu"):
    """images [B, h, w, 3] in 0..1 -> (x_pre_norm, x), both [B, tokens, C] float64."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    eps = 1e-5 if "storage_tokens" in w else 1e-6
    kernel = w["patch_embed.proj.weight"]  # [C, 3, p, p]
    size = kernel.shape[-1]
    rows, columns = images.shape[1] // size, images.shape[2] // size
    x = (images.astype(np.float64) - MEAN) / STD
    cells = [
        np.einsum("bijc,kcij->bk", x[:, r * size : (r + 1) * size, c * size : (c + 1) * size], kernel)
        for r in range(rows)
        for c in range(columns)
    ]
    x = np.stack(cells, 1) + w["patch_embed.proj.bias"]
    cls = w["cls_token"]
    if "pos_embed" in w:
        table = w["pos_embed"][0]
        grid = math.isqrt(len(table) - 1)
        cls = cls + table[0]
        x = x + interpolate(table[1:].reshape(grid, grid, -1), rows, columns, interpolation).reshape(x.shape[1], -1)
    prefix = [cls] + [w[name] for name in ("register_tokens", "storage_tokens") if name in w]
    x = np.concatenate([np.repeat(part, len(x), 0) for part in prefix] + [x], 1)
    depth = len({name.split(".")[1] for name in w if name.startswith("blocks.")})
    for n in range(depth):
        b = {k.removeprefix(f"blocks.{n}."): v for k, v in w.items() if k.startswith(f"blocks.{n}.")}
        y = attention(b, norm(x, b["norm1.weight"], b["norm1.bias"], eps), num_heads, w, (rows, columns))
        x = x + b.get("ls1.gamma", 1) * y
        x = x + b.get("ls2.gamma", 1) * mlp(b, norm(x, b["norm2.weight"], b["norm2.bias"], eps), gate)
    return x, norm(x, w["norm.weight"], w["norm.bias"], eps)


def norm(x, weight, bias, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight + bias


def linear(b, name, x):
    return x @ b[f"{name}.weight"].T + b[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def mlp(b, x, activation):
    if "mlp.fc1.weight" in b:
        return linear(b, "mlp.fc2", gelu(linear(b, "mlp.fc1", x)))
    if "mlp.w12.weight" in b:
        gate, up = np.split(linear(b, "mlp.w12", x), 2, -1)
    else:
        gate, up = linear(b, "mlp.w1", x), linear(b, "mlp.w2", x)
    return linear(b, "mlp.w3", (gelu(gate) if activation == "gelu" else gate / (1 + np.exp(-gate))) * up)


def attention(b, x, num_heads, w, grid):
    bias = b.get("attn.qkv.bias", 0) * b.get("attn.qkv.bias_mask", 1)
    head = x.shape[-1] // num_heads
    qkv = x @ b["attn.qkv.weight"].T + bias
    out = np.empty_like(x)
    for h in range(num_heads):
        q, k, v = (qkv[..., part * x.shape[-1] + h * head :][..., :head] for part in range(3))
        if "rope_embed.periods" in w:
            q, k = rope(q, w["rope_embed.periods"], grid), rope(k, w["rope_embed.periods"], grid)
        logits = q @ k.transpose(0, 2, 1) / math.sqrt(head)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[..., h * head : (h + 1) * head] = weights / weights.sum(-1, keepdims=True) @ v
    return linear(b, "attn.proj", out)


def rope(x, periods, grid):
    """x [B, tokens, d]: the last rows * columns tokens are turned, as DINOv3 states it: x cos + rotate_half(x) sin."""
    out = x.copy()
    first = x.shape[1] - grid[0] * grid[1]
    for r in range(grid[0]):
        for c in range(grid[1]):
            row, column = 2 * (r + 0.5) / grid[0] - 1, 2 * (c + 0.5) / grid[1] - 1
            angle = np.tile(2 * np.pi * np.concatenate([row / periods, column / periods]), 2)  # [d]
            token = x[:, first + r * grid[1] + c]
            half = np.concatenate([-token[:, token.shape[1] // 2 :], token[:, : token.shape[1] // 2]], -1)
            out[:, first + r * grid[1] + c] = token * np.cos(angle) + half * np.sin(angle)
    return out


def cubic(x, a):
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def axis(num_in, num_out, interpolation):
    """For each output sample: [(input sample, weight)]."""
    scale = num_in / (num_out + 0.1 if interpolation == "dinov2" else num_out)
    for i in range(num_out):
        center = (i + 0.5) * scale
        if interpolation == "antialias":
            width = max(scale, 1.0)
            first, last = max(int(center - 2 * width + 0.5), 0), min(int(center + 2 * width + 0.5), num_in)
            taps = [(j, cubic((j - center + 0.5) / width, -0.5)) for j in range(first, last)]
            total = sum(weight for _, weight in taps)
            yield [(j, weight / total) for j, weight in taps]
        else:
            base = math.floor(center - 0.5)
            yield [(min(max(j, 0), num_in - 1), cubic(j - center + 0.5, -0.75)) for j in range(base - 1, base + 3)]


def interpolate(table, rows, columns, interpolation):
    """[gh, gw, C] -> [rows, columns, C]; the table itself where the size is its own."""
    if table.shape[:2] == (rows, columns):
        return table
    out = np.zeros((rows, columns, table.shape[2]))
    for i, row_taps in enumerate(axis(table.shape[0], rows, interpolation)):
        for j, column_taps in enumerate(axis(table.shape[1], columns, interpolation)):
            out[i, j] = sum(a * b * table[r, c] for r, a in row_taps for c, b in column_taps)
    return out
