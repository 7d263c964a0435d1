"""The results of `bench device` as tables in Markdown, and as one object."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GIB = 2**30


def report(rows: Sequence[dict]) -> tuple[str, dict]:
    """(the tables, {"device", "jax", "scenes_per_s" by step, "fitted" by student, "failed"})."""
    lost = [row for row in rows if "failed" in row or "skipped" in row]
    good = [row for row in rows if row not in lost]
    steps = [row for row in good if "step_ms" in row]
    profiles = [row for row in good if "categories" in row]
    published = [row for row in good if "speedup" in row]
    device = next((row["device"] for row in steps), "no step was measured")
    parts = [f"# {device}", ""]
    if steps:
        parts += [f"JAX {steps[0]['jax']}; medians of {steps[0]['runs']} turns.", "", *_steps(steps)]
    parts += _goldens([row for row in good if row["part"] == "goldens"])
    for row in profiles:
        parts += _profile(row)
    parts += _published(published)
    if lost:
        parts += ["## Without a result", ""]
        parts += [f"- {_name(row)}: {row.get('failed') or row['skipped']}" for row in lost] + [""]
    summary = {"device": device, "scenes_per_s": {_name(row): row["scenes_per_s"] for row in steps}}
    summary["fitted"] = {row["part"]: row["fitted"] for row in profiles}
    summary["speedup"] = {row["part"]: row["speedup"] for row in published}
    return "\n".join(parts), {**summary, "lost": len(lost)}


def _name(row: dict) -> str:
    return f"{row['part']}, {row['variant']}" if row["variant"] else row["part"]


def _table(head: str, rows: Iterable[Sequence[object]]) -> list[str]:
    names = head.split(" | ")
    lines = [f"| {head} |", "|" + " --- |" * len(names)]
    return [*lines, *("| " + " | ".join(map(_text, row)) + " |" for row in rows), ""]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _steps(rows: Sequence[dict]) -> list[str]:
    head = "step | ms | predicted ms | scenes/s | MFU | GiB by plan | GiB of the device so far | compile s | program"
    values = [
        (
            _name(row),
            row["step_ms"],
            row["predicted_ms"],
            row["scenes_per_s"],
            None if row["mfu"] is None else f"{100 * row['mfu']:.1f} %",
            row["peak_bytes"] and row["peak_bytes"] / GIB,
            row["device_peak_bytes"] and row["device_peak_bytes"] / GIB,
            row["compile_s"],
            row["executable"],
        )
        for row in rows
    ]
    return _table(head, values)


def _goldens(rows: Sequence[dict]) -> list[str]:
    if not rows:
        return []
    values = [(row["variant"], f"{row['output']:.1e}", row["gradient"] and f"{row['gradient']:.1e}") for row in rows]
    return ["## Beside the published code", "", *_table("golden | output differs by | worst gradient by", values)]


def _profile(row: dict) -> list[str]:
    keys = ("measured_ms", "predicted_ms", "fitted_ms", "gb", "tflop", "kernels")
    values = [(name, *(total[key] for key in keys)) for name, total in row["categories"].items()]
    between = f"A traced step takes {row['traced_ms']:.1f} ms, its kernels {row['busy_ms']:.1f}; predicted "
    between += f"{row['predicted_ms']:.1f}. The trace shows no time of {row['unseen_kernels']} kernels."
    fitted = [(name, value, row["fitted"][name]) for name, value in row["constants"].items()]
    table = _table("kind | measured ms | predicted ms | with fitted constants | GB | TFLOP | kernels", values)
    return [f"## Kernels of {row['part']}", "", between, "", *table, *_table("constant | assumed | fitted", fitted)]


def _published(rows: Sequence[dict]) -> list[str]:
    if not rows:
        return []
    head = "published student | its step ms | ours | times as many scenes | its memory / ours"
    values = [
        (row["part"], 1e3 * row["published_step_s"], 1e3 * row["step_s"], row["speedup"], row["memory_ratio"])
        for row in rows
    ]
    return ["## Beside the published students in PyTorch", "", *_table(head, values)]
