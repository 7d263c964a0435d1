"""metrics.jsonl, TensorBoard when it is installed, and one line of progress a few seconds apart."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import json_text, written_whole

PROGRESS_SECONDS = 3.0


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """A line every few seconds of how much is done and how long the rest will take."""

    def __init__(self, *, active: bool):
        self._active, self._done, self._started, self._said = active, 0, 0.0, 0.0

    def add(self, text: str, remaining: float) -> None:
        """One more is done, and so many remain. The first is not timed: it waited for the compiler."""
        now = time.monotonic()
        if self._done == 0:
            self._started = self._said = now
        elif self._active and now - self._said > PROGRESS_SECONDS:
            self._said = now
            left = (now - self._started) / self._done * max(remaining, 0)
            print(f"{text}, {format_seconds(left)} left", flush=True)
        self._done += 1


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, but for the half one that a killed process may have left at the end.

    Raises `InputError`, which names the line, for one that is no JSON object with a whole number as its step.
    """
    try:
        texts = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); move it away, or copy the workdir again") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(texts):
                break
            line = None
        if not isinstance(line, dict) or type(line.get("step", 0)) is not int:
            raise InputError(f"{path}: line {number} is no JSON object with a whole step; remove the line")
        lines.append(line)
    return lines


class MetricWriter:
    """Appends to `workdir/metrics.jsonl`; `active=False` (all processes but one) writes nothing."""

    def __init__(self, workdir: Path, *, num_steps: int, active: bool = True, label: str = ""):
        self._path = workdir / "metrics.jsonl"
        self._num_steps, self._active, self._label = num_steps, active, label
        self._started, self._first_step, self._last_line = time.monotonic(), 0, 0.0
        self._board: Any = None
        if active:
            with contextlib.suppress(ImportError):  # of the extra "log"
                from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

                self._board = SummaryWriter(str(workdir / "tensorboard"))

    def resume(self, step: int) -> None:
        """Cut the file to `step` (what came after it will be written again) and note the resume."""
        self._started, self._first_step = time.monotonic(), step
        if not self._active:
            return
        lines = read_metrics(self._path) if self._path.exists() else []
        kept = [line for line in lines if line.get("step", 0) <= step] + [{"event": "resume", "step": step}]
        with written_whole(self._path) as file:
            file.write("".join(json_text(line) + "\n" for line in kept).encode())

    def restart(self) -> None:
        """Removes the lines of a run that was killed before its first checkpoint: its steps will be made again."""
        if self._active:
            self._path.unlink(missing_ok=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One JSON object, {"step": ..., "train/loss": ...}, without the values that are not finite, and a line of
        progress when some seconds have passed."""
        if not self._active:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        with self._path.open("a") as file:
            file.write(json_text({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        now = time.monotonic()
        if now - self._last_line >= PROGRESS_SECONDS or step == self._num_steps:
            self._last_line = now
            print(self._line(step, values, now), flush=True)

    def _line(self, step: int, values: dict[str, float], now: float) -> str:
        left = (now - self._started) / max(step - self._first_step, 1) * (self._num_steps - step)
        loss = f"loss {values['train/loss']:.4f}" if "train/loss" in values else "loss not finite"
        parts = [f"{self._label} step {step}/{self._num_steps}".strip(), loss]
        if "train/loss_constant" in values:
            parts.append(f"(constant {values['train/loss_constant']:.4f})")
        parts += [f"{values['train/points_per_s']:,.0f} points/s", f"fill {100 * values['train/point_fill']:.0f} %"]
        if values.get("train/skipped_steps"):
            parts.append(f"skipped {values['train/skipped_steps']:.0f}")
        return "  ".join([*parts, f"{format_seconds(left)} left"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
