"""The parts of `bench device` and its lines of results. Nothing here needs JAX: the process that starts the parts must
leave the device to them."""

from __future__ import annotations

import json
from pathlib import Path

from scalr_jax.runtime.storage import json_text

RESULTS, BATCH, GOLDEN, EXECUTABLES = "results.jsonl", "batch.npz", "golden", "executables"
PUBLISHED = {"published_vavit": "vavit", "published_waffleiron": "waffleiron"}  # part -> flag of its clone
STUDENTS = ("vavit_b", "waffleiron", "vavit_l")
VARIANTS = tuple(f"{name}_variants" for name in STUDENTS)
PARTS = ("goldens", "vavit_b", "published_vavit", "waffleiron", "published_waffleiron", "vavit_l", *VARIANTS)
LIMITS = {"goldens": 120}  # seconds that a part may take, of a device that compiles slowly


def record(output: Path, part: str, variant: str = "", /, **values: object) -> None:
    """Appends one result, and prints it."""
    with (output / RESULTS).open("a") as file:
        file.write(json_text({"part": part, "variant": variant, **values}) + "\n")
    told = values.get("failed") or values.get("skipped")
    told = told or ", ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))
    print(f"{part}{', ' if variant else ''}{variant}: {told}", flush=True)


def results(output: Path) -> list[dict]:
    """The recorded results; the last one of a variant that ran twice."""
    found: dict[tuple[str, str], dict] = {}
    path = output / RESULTS
    for line in path.read_text().splitlines() if path.is_file() else ():
        row = json.loads(line)
        found[row["part"], row["variant"]] = row
    return list(found.values())
