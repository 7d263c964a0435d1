"""Parts of datasets: label fractions and lists of frames."""

import pytest

from scalr_jax.data.joined import every_nth, listed
from scalr_jax.data.streets.streets import Streets
from scalr_jax.runtime.errors import InputError
from tests.support.checks import mentions
from tests.support.datasets import Frames


class Scans(Frames):
    """Twelve frames of two drives."""

    def __len__(self):
        return 12

    def name(self, index):
        return f"scans/{index // 6}/{index % 6}"

    def scan_file(self, index):
        return f"lidar/{index:03d}.bin"


def used(subset):
    return [int(subset.frame(i).points[0, 0]) for i in range(len(subset))]


def test_every_nth():
    assert used(every_nth(Scans(), 5)) == [0, 5, 10]


def test_every_nth_of_each_street_sensor(tmp_path):
    """Their frames take turns: with two sensors every tenth frame would always be the first one's."""
    streets = Streets(tmp_path, split="train", num_scenes=40, sensors=("beams32", "solid"))
    chosen = every_nth(streets, 10)
    assert list(chosen.indices) == [0, 1, 20, 21]
    assert [streets.sensor(i) for i in chosen.indices] == ["beams32", "solid"] * 2


@pytest.mark.parametrize("line", ["scans/1/2", "1/2", "lidar/008.bin", "008.bin"])
def test_a_frame_is_known_by_each_of_its_names(tmp_path, line):
    path = tmp_path / "list.txt"
    path.write_text(f"# my frames\n\n  {line}  # a good one\nscans/0/1\n")
    subset = listed(Scans(), path)
    assert used(subset) == [1, 8], "in the dataset's order"
    assert subset.name(1) == "scans/1/2"


def test_lists_that_cannot_be_meant(tmp_path):
    path = tmp_path / "list.txt"
    with pytest.raises(InputError, match=r"list\.txt"):
        listed(Scans(), path)
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match=r"list\.txt.*no frame"):
        listed(Scans(), path)
    path.write_text("1/2\n7/7\n8/8\n")
    with pytest.raises(InputError, match=mentions("2 of 3", "7/7", "scans/0/0")):
        listed(Scans(), path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"list\.txt"):
        listed(Scans(), path)
