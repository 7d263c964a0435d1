"""The teacher's forward pass on random images, with random weights of the published shapes.

    python -m scalr_jax.bench teacher --teacher=vitl14 --image_size=224,448
    python -m scalr_jax.bench teacher --teacher=demo --images=8

Figures:

    forward_s     median of --runs
    flops, mfu    matrix products and attention (models/flops.py), over the chip's dense bfloat16 peak
    peak_bytes    arguments, outputs and temporary buffers by XLA's plan
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from scalr_jax.bench import timing
from scalr_jax.models import vit
from scalr_jax.models.build import compute_dtype
from scalr_jax.models.flops import teacher_flops
from scalr_jax.models.vit import TEACHERS
from scalr_jax.runtime.chips import check_room, device_bytes, utilisation
from scalr_jax.runtime.errors import InputError

DTYPES = ("auto", "float32", "bfloat16")


def main(argv: list[str]) -> dict:
    """Measures, prints a table and returns the object of the last line."""
    parser = timing.Parser("-m scalr_jax.bench teacher", __doc__)
    add_teacher_arguments(parser)
    parser.add_argument("--images", type=timing.positive, default=8)
    parser.add_argument("--image_size", type=timing.two_sizes, default=(224, 448), help="rows,columns")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights and products")
    parser.add_argument("--runs", type=timing.positive, default=5)
    arguments = parser.parse_args(argv)
    rows, columns = arguments.image_size
    needed = 4 * 3 * arguments.images * rows * columns
    check_room(needed, f"--images={arguments.images} of --image_size={rows},{columns}", "lower these")
    vit_config, params = teacher_of(arguments, arguments.image_size)
    images = jax.random.uniform(jax.random.key(1), (arguments.images, *arguments.image_size, 3))
    features = jax.jit(lambda params, images: vit.features(vit_config, params, images))
    compiled = features.lower(params, images).compile()
    times = timing.interleave({"forward_s": lambda: compiled(params, images)}, runs=arguments.runs)["forward_s"]
    timing.show_times({"forward_s": (times, f"{arguments.images} images of {arguments.image_size}")})
    num_flops = teacher_flops(vit_config, arguments.images, arguments.image_size)
    device = timing.header(arguments.runs)
    result = {
        **device,
        "teacher": arguments.teacher,
        "images": arguments.images,
        "image_size": list(arguments.image_size),
        "tokens": vit.num_tokens(vit_config, arguments.image_size),
        "dtype": jax.tree.leaves(params)[0].dtype.name,
        "forward_s": times.median,
        "range_s": [times.low, times.high],
        "images_per_s": arguments.images / times.median,
        "peak_bytes": timing.compiled_bytes(compiled),
        "device_peak_bytes": device_bytes(),
        "flops": num_flops,
        "mfu": utilisation(num_flops, times.median, device["device"]),
    }
    print(f"{result['images_per_s']:.1f} images/s, {num_flops / times.median / 1e12:.3g} TFLOP/s")
    return timing.rounded(result)


def add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `teacher_of` reads, but for --dtype."""
    parser.add_argument("--teacher", choices=(*TEACHERS, "demo"), default="vitl14", help="demo: the packaged one")
    parser.add_argument("--registers", type=int, default=0, help="register tokens: 4 in the _reg4 models")


def teacher_of(arguments: argparse.Namespace, image_size: tuple[int, int]) -> tuple[vit.ViTConfig, dict]:
    """(config, params in the dtype that `arguments.dtype` names). Random, but for the packaged one."""
    if arguments.registers < 0:
        raise InputError(f"--registers={arguments.registers} must not be negative")
    dtype = compute_dtype(arguments.dtype, jax.default_backend())
    if arguments.teacher == "demo":
        from scalr_jax.interop.teacher import load_demo_teacher

        vit_config, params = load_demo_teacher()
    else:
        vit_config, params = dataclasses.replace(TEACHERS[arguments.teacher], num_registers=arguments.registers), None
    try:
        vit.patch_grid(vit_config, image_size)
    except ValueError as error:
        raise InputError(f"--image_size: {error}") from error
    if params is None:
        params = vit.init(vit_config, jax.random.key(0), image_size)
    return vit_config, jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
