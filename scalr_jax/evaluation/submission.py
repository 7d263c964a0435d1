"""The prediction files that the benchmarks of nuScenes-lidarseg and SemanticKITTI take, a file a scan.

    lidarseg/<set>/<token>_lidarseg.bin         uint8, 1 to 16; beside them <set>/submission.json
    sequences/<XX>/predictions/<NNNNNN>.label   uint32, the dataset's own numbers (its learning_map_inv)

<set>: train, val, test, mini_train or mini_val. What a set holds is not judged by the files on disk: of nuScenes it is
every keyframe in the tables, of SemanticKITTI the official number of each sequence. Files are written into a folder
beside their place, which takes its name when every scan has one and all were read back as they were written; else
nothing is left.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from scalr_jax.config import USES
from scalr_jax.data.joined import Joined
from scalr_jax.data.readers.nuscenes import NuScenes
from scalr_jax.data.readers.semantic_kitti import NUM_SCANS, SPLITS, SemanticKITTI
from scalr_jax.data.scenes import Dataset
from scalr_jax.data.sensors import raw_labels
from scalr_jax.evaluation.segmentation import ScanClasses
from scalr_jax.runtime import distributed
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import write_json

SETS = {
    ("v1.0-trainval", "train"): "train",
    ("v1.0-trainval", "validation"): "val",
    ("v1.0-mini", "train"): "mini_train",
    ("v1.0-mini", "validation"): "mini_val",
    ("v1.0-test", "all"): "test",
}


class Submission:
    """Collects the scans of one evaluation, as a context manager; `add` each scan, then `finish`.

    Raises `InputError` for another dataset than `NuScenes` or `SemanticKITTI` as they were downloaded, an
    existing folder, scans of the set that are not on disk, or unknown `uses` (the inputs that submission.json
    names).
    """

    def __init__(self, dataset: Dataset, folder: Path, uses: Sequence[str] = ("lidar",)):
        if unknown := sorted(set(uses) - set(USES)):
            raise InputError(f"evaluate.submission_uses has {', '.join(unknown)}; it takes some of {', '.join(USES)}")
        if isinstance(dataset, Joined) and len(dataset.datasets) == 1:
            dataset = dataset.datasets[0]
        if not isinstance(dataset, NuScenes | SemanticKITTI):
            raise InputError(
                "evaluate.submission needs nuScenes or SemanticKITTI as they were downloaded: there is no benchmark of "
                "other datasets, and prepared records lack its names"
            )
        if isinstance(dataset, NuScenes) and (dataset.version, dataset.split) not in SETS:
            raise InputError(f"split {dataset.split!r} of {dataset.version} is no evaluation set of nuScenes-lidarseg")
        if folder.exists():
            raise InputError(f"{folder} exists; remove it, or give another --workdir")
        self._dataset, self.folder, self._uses = dataset, folder, uses
        self._check_complete()
        self._partial = folder.with_name(f".{folder.name}.partial")
        self._checksums: dict[Path, int] = {}  # of this process's files

    def _check_complete(self) -> None:
        """Raises `InputError` unless the dataset lists exactly the scans of its set; before hours of evaluation."""
        found = {self._files(index)[0] for index in range(len(self._dataset))}
        expected = self._expected()
        if missing := sorted(expected - found):
            raise InputError(
                f"{self._dataset.root} is incomplete: of {len(expected)} scans of split {self._dataset.split!r} "
                f"{len(missing)} cannot be submitted, as {missing[0]}: the scan (or a label file, in a set that has "
                "labels) is missing; unpack all of them, or leave out evaluate.submission"
            )
        if surplus := sorted(found - expected):
            raise InputError(
                f"{self._dataset.root} has {len(surplus)} scans that are not in the benchmark, as {surplus[0]}; move "
                "them away, or leave out evaluate.submission"
            )

    def _expected(self) -> set[Path]:
        """The files of the whole set, below the folder."""
        if isinstance(self._dataset, NuScenes):
            return {self._nuscenes_file(token) for token in self._dataset.scan_tokens}
        counts = {sequence: NUM_SCANS[sequence] for sequence in SPLITS[self._dataset.split]}
        return {_kitti_file(sequence, f"{n:06d}") for sequence, count in counts.items() for n in range(count)}

    def _nuscenes_file(self, token: str) -> Path:
        return Path("lidarseg", self._set(), f"{token}_lidarseg.bin")

    def __enter__(self) -> Submission:
        if jax.process_index() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)  # of a killed run
            self._partial.mkdir(parents=True)
        distributed.barrier(f"submission {self.folder}")
        return self

    def __exit__(self, *_: object) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, scan: ScanClasses) -> None:
        """Writes one scan's file. Raises `InputError` when a point of the scan's file has no class."""
        file, source, size = self._files(scan.frame_index)
        points = source.stat().st_size // size
        if len(scan.classes) != points:
            raise InputError(
                f"{self._dataset.name(scan.frame_index)}: {points - len(scan.classes)} of {points} points are not "
                "finite, and a submission needs a class for every point; repair the scan"
            )
        if isinstance(self._dataset, NuScenes):
            content = (scan.classes + np.uint8(1)).tobytes()
        else:
            content = raw_labels(scan.classes, self._dataset.class_names)[0].astype("<u4").tobytes()
        path = self._partial / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self._checksums[file] = zlib.crc32(content)

    def finish(self) -> None:
        """Reads the files back, and moves the folder to its place.

        Raises:
            InputError: a scan has no file (it was skipped as bad), or a file does not hold what was written.
        """
        if isinstance(self._dataset, NuScenes) and jax.process_index() == 0:
            meta = {f"use_{name}": name in self._uses for name in USES}
            write_json(self._partial / self._set() / "submission.json", {"meta": meta})
        damaged = [f for f, crc in self._checksums.items() if zlib.crc32((self._partial / f).read_bytes()) != crc]
        distributed.barrier(f"submission {self.folder} written")
        expected = [self._files(index)[0] for index in range(len(self._dataset))]
        missing = [file for file in expected if not (self._partial / file).is_file()]
        if missing or damaged:
            raise InputError(
                f"no submission was written: of {len(expected)} scans {len(missing)} have no predictions and "
                f"{len(damaged)} files are not as they were written, as {(missing + damaged)[0]}; see the bad frames "
                "named above, and the free space"
            )
        distributed.barrier(f"submission {self.folder} read back")
        if jax.process_index() == 0:
            self._partial.rename(self.folder)
            print(f"{len(expected)} prediction files in {self.folder}, read back and complete", flush=True)

    def _set(self) -> str:
        """The evaluation set, in nuScenes' words; SemanticKITTI's files do not say theirs."""
        return SETS[self._dataset.version, self._dataset.split] if isinstance(self._dataset, NuScenes) else ""

    def _files(self, index: int) -> tuple[Path, Path, int]:
        """A scan's file below the folder, the scan itself, and its bytes a point: five numbers of four, or four."""
        root = self._dataset.root
        if isinstance(self._dataset, NuScenes):
            file = self._nuscenes_file(self._dataset.scan_token(index))
            return file, root / self._dataset.scan_file(index), 20
        _, sequence, number = self._dataset.name(index).split("/")
        scan = root / "dataset" / "sequences" / sequence / "velodyne" / f"{number}.bin"
        return _kitti_file(sequence, number), scan, 16


def _kitti_file(sequence: str, number: str) -> Path:
    return Path("sequences", sequence, "predictions", f"{number}.label")
