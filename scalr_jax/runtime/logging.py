"""metrics.jsonl, TensorBoard when it is installed, and one line of progress a few seconds apart."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from scalr_jax.runtime.storage import written_whole

PROGRESS_SECONDS = 3.0


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class MetricWriter:
    """Appends to `workdir/metrics.jsonl`; `active=False` (all processes but one) writes nothing."""

    def __init__(self, workdir: Path, *, num_steps: int, active: bool = True, label: str = ""):
        self._path = workdir / "metrics.jsonl"
        self._num_steps, self._active, self._label = num_steps, active, label
        self._started, self._first_step, self._last_line = time.monotonic(), 0, 0.0
        self._board = _tensorboard(workdir / "tensorboard") if active else None

    def resume(self, step: int) -> None:
        """Cut the file to `step` (what came after it will be written again) and note the resume."""
        self._started, self._first_step = time.monotonic(), step
        if not self._active:
            return
        kept = [line for line in self._lines() if line.get("step", 0) <= step]
        kept.append({"event": "resume", "step": step})
        with written_whole(self._path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    def _lines(self) -> list[dict]:
        """The readable lines; a killed process may have left half a one."""
        lines = []
        for text in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return lines

    def write(self, step: int, values: dict[str, float]) -> None:
        """One JSON object, {"step": ..., "train/loss": ...}, and a line of progress when some seconds have passed."""
        if not self._active:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        now = time.monotonic()
        if now - self._last_line >= PROGRESS_SECONDS or step == self._num_steps:
            self._last_line = now
            print(self._line(step, values, now), flush=True)

    def _line(self, step: int, values: dict[str, float], now: float) -> str:
        left = (now - self._started) / max(step - self._first_step, 1) * (self._num_steps - step)
        parts = [f"{self._label} step {step}/{self._num_steps}".strip(), f"loss {values['train/loss']:.4f}"]
        if "train/loss_constant" in values:
            parts.append(f"(constant {values['train/loss_constant']:.4f})")
        parts.append(f"{values['train/points_per_s']:,.0f} points/s")
        parts.append(f"fill {100 * values['train/point_fill']:.0f} %")
        parts.append(f"{format_seconds(left)} left")
        return "  ".join(parts)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _tensorboard(directory: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return SummaryWriter(str(directory))
