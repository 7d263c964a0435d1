"""The released corrupted sets of Robo3D, beside the clear dataset that they were made from.

    SemanticKITTI-C   <root>/<corruption>/<severity>/velodyne/*.bin and labels/*.label, sequence 08
    nuScenes-C        <root>/<corruption>/<severity>/samples/LIDAR_TOP/*.bin and lidarseg/v1.0-trainval/*.bin

Both are the files of the clear set with other contents, so its readers, tables and label maps serve here too, and a
set with fewer scans than the clear one is refused: what is published is of them all.
Corruptions and severities are named as in `evaluation/corruptions.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path

from scalr_jax.data.joined import Joined
from scalr_jax.data.readers import files
from scalr_jax.data.readers.nuscenes import NuScenes
from scalr_jax.data.readers.semantic_kitti import SemanticKITTI
from scalr_jax.data.scenes import Dataset
from scalr_jax.runtime.errors import InputError

SEQUENCE = "08"  # of SemanticKITTI-C


def open_released(clear: Dataset, root: Path, corruption: str, severity: str) -> Dataset:
    """The scans of <root>/<corruption>/<severity>, whose `clear` validation set is `NuScenes` or `SemanticKITTI` with
    labels. Raises InputError: another dataset, no such folder, or other scans than the clear set's."""
    if isinstance(clear, Joined) and len(clear.datasets) == 1:
        clear = clear.datasets[0]
    folder = root / corruption / severity
    if isinstance(clear, SemanticKITTI):
        return SemanticKITTIC(clear, folder)
    if isinstance(clear, NuScenes):
        files.check_folder(folder / "samples" / "LIDAR_TOP", f"{root}/CORRUPTION/SEVERITY/samples/LIDAR_TOP")
        files.check_folder(folder / "lidarseg", f"{root}/CORRUPTION/SEVERITY/lidarseg/v1.0-trainval")
        scans = [clear.scan_file(k) for k in range(len(clear))]
        there = {name for parent in {Path(s).parent for s in scans} for name in files.listing(folder / parent)}
        _check_complete(folder, {Path(scan).name for scan in scans}, there)
        corrupted = copy.copy(clear)
        corrupted.root = folder  # where scans and labels are read; tables and what there is are the clear set's
        return corrupted
    raise InputError(
        f"evaluate.corrupted_root = {root}: released corruptions exist of nuScenes and SemanticKITTI as downloaded; "
        "leave it empty to corrupt other datasets here"
    )


def _check_complete(folder: Path, wanted: set[str], there: Collection[str]) -> None:
    """Raises `InputError` that says how many of the clear set's scans are missing, and names three."""
    if missing := sorted(wanted.difference(there)):
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(
            f"{folder}: {len(missing)} of the clear set's {len(wanted)} scans are missing ({named}), and the published "
            "figures are of all; unpack the set again"
        )


class SemanticKITTIC(SemanticKITTI):
    """The clear set's scans with one corruption: `folder`/velodyne/NNNNNN.bin and `folder`/labels/NNNNNN.label."""

    def __init__(self, clear: SemanticKITTI, folder: Path):
        self.__dict__.update(clear.__dict__)
        self.folder = folder
        files.check_folder(folder / "velodyne", "SemanticKITTI-C, <root>/<corruption>/<severity>/velodyne/*.bin")
        scans = sorted(name for name in files.listing(folder / "velodyne") if name.endswith(".bin"))
        numbers = [name.removesuffix(".bin") for name in scans]
        labels = files.listing(folder / "labels")
        missing = [number for number in numbers if f"{number}.label" not in labels]
        if missing or not scans:
            what = f"{len(missing)} of {len(scans)} scans have no label file in labels/" if scans else "no scan"
            raise InputError(f"{folder}: {what}; unpack the set again")
        wanted = {clear.name(k).removeprefix("semantic_kitti/") for k in range(len(clear))}
        there = {f"{SEQUENCE}/{number}" for number in numbers}
        _check_complete(folder, wanted, there)
        if more := sorted(there - wanted):
            raise InputError(
                f"{folder}: {len(more)} of its {len(there)} scans, as {more[0]}, are not in the clear set or have no "
                f"labels there; complete {clear.root}"
            )

    def name(self, index: int) -> str:
        """As "fog/light/000001"."""
        return f"{self.folder.parent.name}/{self.folder.name}/{self._entries[index].number}"

    def sensor(self, index: int) -> str:
        return "semantic_kitti"

    def _folder(self, sequence: str) -> Path:
        return self.folder
