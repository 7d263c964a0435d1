"""Folders that tests read: the project, its golden arrays, and real frames where they are."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SHARED = Path(os.environ.get("SCALR_JAX_SHARED", ROOT.parent / "shared"))
SAMPLES = SHARED / "samples"
