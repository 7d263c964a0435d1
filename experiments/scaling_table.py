"""Remakes the table of docs/measurements/scaling.md: compiles every row, keeps it in scaling.jsonl, prints Markdown.

    python experiments/scaling_table.py            # rows that are not in the file yet; hours on two cores
    python experiments/scaling_table.py --print    # only the table

Needs the tpu extra. Delete docs/measurements/scaling.jsonl to begin again.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/measurements/scaling.jsonl"
SMALL, LARGE = "224,448", "448,896"

# student's channels, teacher, image rows and columns, topology, slices, mesh.fsdp
ROWS = (
    (768, "vitl14", SMALL, "v5p:8x8x16", 1, 1),
    (768, "vitl14", SMALL, "v5p:2x2x1", 1, 1),
    (768, "vitl14", SMALL, "v5e:4x4", 1, 1),
    (768, "vit7b16", SMALL, "v5e:4x4", 1, 1),
    (768, "vit7b16", SMALL, "v5e:4x4", 1, 16),
    (768, "vitl14", LARGE, "v5e:4x4", 1, 1),
    (384, "vitl14", SMALL, "v5e:4x4", 1, 1),
    (256, "vits14", SMALL, "v5e:2x2", 1, 1),
    (768, "vitg14", SMALL, "v5e:4x4", 1, 1),
    (768, "vitg14", LARGE, "v6e:4x4", 1, 1),
    (768, "vit7b16", SMALL, "v6e:4x4", 1, 1),
    (768, "vit7b16", LARGE, "v5p:4x4x4", 1, 1),
    (768, "vit7b16", LARGE, "v5p:4x4x4", 1, 4),
    (768, "vitl14", SMALL, "v4:2x2x1", 1, 1),
    (768, "vitl14", SMALL, "tpu7x:2x2x1", 1, 1),
    (768, "vitl14", SMALL, "v6e:16x16", 4, 1),
    (384, "vitb14", LARGE, "v6e:4x4", 1, 1),
    (768, "vit7b16", SMALL, "v5p:8x8x16", 1, 4),
)


def command(row: tuple) -> list[str]:
    channels, teacher, image_size, topology, slices, fsdp = row
    arguments = [f"--topology={topology}", f"--teacher={teacher}", f"--config.model.channels={channels}"]
    arguments += [f"--config.data.image_size=({image_size})"] if image_size != SMALL else []
    arguments += [f"--slices={slices}"] if slices > 1 else []
    arguments += [f"--config.mesh.fsdp={fsdp}"] if fsdp > 1 else []
    return ["python", "-m", "scalr_jax.compile", "--config=configs/pretrain/scalr_packed_wi48_768.py", *arguments]


def key(row: tuple) -> str:
    return " ".join(map(str, row))


def results() -> dict[str, dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {line["row"]: line for line in map(json.loads, lines)}


def measure(row: tuple) -> None:
    """Appends the row's result. Exit code 2 is a result too, where it says that the step does not fit."""
    print(" ".join(command(row)), flush=True)
    done = subprocess.run([sys.executable, *command(row)[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode not in (0, 2) or not lines or not lines[-1].startswith("{"):
        sys.exit(f"no result: {done.stderr.strip().splitlines()[-1]}")
    line = {"row": key(row), "date": str(datetime.date.today()), **json.loads(lines[-1])}
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def table() -> str:
    found = results()
    lines = [
        "| WI-48- | teacher | image | topology | devices | fsdp | fits | GiB a device | reduced MB | "
        "gathered MB | others MB | TFLOPs | GB |",
        "| --- " * 13 + "|",
    ]
    for row in ROWS:
        if key(row) not in found:
            continue
        result = found[key(row)]
        channels, teacher, image_size, topology, slices, fsdp = row
        sent = {kind: total["bytes"] / 1e6 for kind, total in (result["collectives"] or {}).items()}
        reduced = sent.pop("all-reduce", 0.0) + sent.pop("reduce-scatter", 0.0)
        gathered = sent.pop("all-gather", 0.0)
        memory = f"{result['peak_bytes_per_device'] / 2**30:.1f} of {result['hbm_bytes'] / 2**30:.1f}"
        cells = [channels, teacher, image_size.replace(",", "x"), f"{slices} x {topology}" if slices > 1 else topology]
        cells += [f"{result['devices']:,}", fsdp, "yes" if result["fits"] else "**no**", memory]
        if result["fits"]:
            cells += [f"{reduced:,.1f}", f"{gathered:,.1f}", f"{sum(sent.values()):,.1f}"]
            cells += [f"{result['flops_per_device'] / 1e12:.1f}", f"{result['bytes_per_device'] / 1e9:.0f}"]
        else:
            cells += [""] * 5
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--print" not in sys.argv:
        for row in ROWS:
            if key(row) not in results():
                measure(row)
    print(table())
