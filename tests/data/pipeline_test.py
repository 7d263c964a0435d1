"""Order, packing and exact resume: the same for any number of processes and workers; bad frames among them."""

import dataclasses
import gc
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from scalr_jax.data.joined import Joined
from scalr_jax.data.packing import Capacities, in_buckets
from scalr_jax.data.pipeline import prefetch
from scalr_jax.runtime.errors import InputError
from tests.support.checks import mentions, present
from tests.support.clouds import CAPACITIES, SETTINGS, Clouds, pipeline


def contents(steps, number):
    """Per step and shard: the scenes' names and the sum of their features (so augmentation counts)."""
    found = []
    for _ in range(number):
        step = next(steps)
        found.append([[(scene.name, float(scene.feats.sum())) for scene in scenes] for scenes in step.scenes])
    return found


def run(positions=None, number=12, **changes):
    p = pipeline(**changes)
    return contents(p.steps(CAPACITIES, p.sample(4)[0], positions), number)


def test_processes_see_the_streams_of_their_shards():
    """Four shards on one process, on two, on four: shard by shard the same packs."""
    together = run(num_shards=4, shards=range(4))
    for shards in ([0, 1], [2, 3], [1], [3]):
        apart = run(num_shards=4, shards=shards)
        assert [[step[i] for i in shards] for step in together] == apart


@pytest.mark.slow
def test_workers_do_not_change_the_order():
    plain = run(dataset=Clouds(bad=(3,)))
    assert run(dataset=Clouds(bad=(3,)), num_workers=3) == plain


@dataclasses.dataclass(frozen=True)
class Files(Clouds):
    """Clouds that lie in files of 1,000 bytes; what is read, by whichever process, is noted in `log`."""

    number: int = 24
    root: str = ""

    def frame(self, index, rng=None, *, camera=None):
        data = (Path(self.root) / f"{index}.bin").read_bytes()
        with (Path(self.root) / "log").open("a") as log:
            log.write(f"{index} {len(data)}\n")
        return super().frame(index, rng)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(1, 2), (4, 1)])
def test_each_of_n_processes_reads_an_nth_of_the_bytes(number, workers, tmp_path):
    """Four shards, one or two workers a process, one epoch: by count, and together every file once."""
    dataset, log = Files(root=str(tmp_path)), tmp_path / "log"
    for index in range(24):
        (tmp_path / f"{index}.bin").write_bytes(bytes(1_000))
    template, read = pipeline().sample(1)[0], []
    for process in range(number):
        shards = range(process * 4 // number, (process + 1) * 4 // number)
        steps = pipeline(dataset=dataset, num_shards=4, shards=shards, num_workers=workers, epochs=1).steps(
            CAPACITIES, template
        )
        while next(steps).num_scenes:
            pass
        # Before new workers start: the resource tracker of CPython 3.12.1 complains when old ones are freed meanwhile.
        del steps
        gc.collect()
        lines = [line.split() for line in log.read_text().splitlines()]
        log.unlink()
        assert sum(int(size) for _, size in lines) == 24_000 // number
        read += [int(index) for index, _ in lines]
    assert sorted(read) == list(range(24))


def test_every_epoch_has_every_frame_once_in_another_order():
    p = pipeline()
    names = [p.order()[i].name for i in range(46)]
    first, second = names[:23], names[23:]
    assert sorted(first) == sorted(second) == sorted({f"clouds/{i}" for i in range(23)})
    assert first != second


def test_augmentation_differs_between_epochs():
    p = pipeline()
    frames = {}
    for i in range(46):
        scene = p.order()[i]
        frames.setdefault(scene.name, []).append(scene.feats)
    assert all(a.shape != b.shape or not np.array_equal(a, b) for a, b in frames.values())


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "workers", "lookahead"), [(1, 0, 1), (5, 2, 1), (9, 0, 3), (4, 2, 3), (0, 0, 3)])
def test_resume_is_exact(stop, workers, lookahead):
    """In the middle of an epoch, with scenes that wait and bad frames, whatever the number of workers."""
    options = {"dataset": Clouds(bad=(5,)), "num_shards": 2, "shards": range(2), "lookahead": lookahead}
    whole = run(**options)
    p = pipeline(**options)
    steps, positions = p.steps(CAPACITIES, p.sample(4)[0]), p.beginning()
    for _ in range(stop):
        positions = next(steps).positions
    assert run(positions.tolist(), 12 - stop, num_workers=workers, **options) == whole[stop:]


def mixture(**weights):
    return Joined([Named(n, prefix=prefix) for n, prefix in ((10, "a"), (40, "b"), (5, "c"))], **weights)


@dataclasses.dataclass(frozen=True)
class Named(Clouds):
    """Clouds with a name of their own."""

    prefix: str = ""

    def frame(self, index, rng=None, *, camera=None):
        return super().frame(index, rng)._replace(name=f"{self.prefix}/{index}")


def test_a_weighted_mixture_draws_in_proportion_and_each_frame_as_often_as_the_others():
    p = pipeline(dataset=mixture(weights=(2, 1, 1)))
    order = p.order()
    scenes = [order[i] for i in range(4 * 55)]
    names = [scene.name for scene in scenes]
    assert {k: sum(name[0] == k for name in names) for k in "abc"} == {"a": 4 * 28, "b": 4 * 13, "c": 4 * 14}
    assert all(abs(sum(name[0] == "a" for name in names[s::4]) - 28) < 14 for s in range(4)), "no shard lacks a dataset"
    counts = Counter(names)
    for prefix, frames in (("a", 10), ("b", 40), ("c", 5)):
        own = [counts[f"{prefix}/{i}"] for i in range(frames)]
        assert max(own) - min(own) <= 1, "a dataset begins again only when all its frames were drawn"
    first = {}
    for scene in scenes:
        first.setdefault(scene.name, []).append(scene.feats)
    assert all(len(f) < 2 or f[0].shape != f[1].shape or (f[0] != f[1]).any() for f in first.values())


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, (2, 1, 1)])
def test_a_mixture_is_the_same_for_any_processes_workers_and_resumption(weights):
    dataset = mixture(weights=weights)
    together = run(dataset=dataset, num_shards=2, shards=range(2))
    assert [[step[1]] for step in together] == run(dataset=dataset, num_shards=2, shards=[1], num_workers=2)
    p = pipeline(dataset=dataset, num_shards=2, shards=range(2))
    steps = p.steps(CAPACITIES, p.sample(4)[0])
    positions = [next(steps).positions for _ in range(5)][-1]
    assert run(positions.tolist(), 7, dataset=dataset, num_shards=2, shards=range(2)) == together[5:]


def test_weights_that_cannot_be_meant():
    for weights, message in (((1, 2), "2 .* 3"), ((1, 0, 1), "positive"), ((1, np.inf, 1), "positive")):
        with pytest.raises(InputError, match=message):
            mixture(weights=weights)
    with pytest.raises(InputError, match="no scene in an epoch"):
        pipeline(dataset=mixture(weights=(1, 1, 1e-6))).sample()


def test_a_bad_frame_is_dropped_named_and_counted(caplog):
    p = pipeline(dataset=Clouds(bad=(3,)))
    steps = p.steps(CAPACITIES, p.sample(4)[0])
    with caplog.at_level("WARNING", logger="absl"):
        items = [next(steps) for _ in range(12)]
    names = [scene.name for item in items for scenes in item.scenes for scene in scenes]
    assert "clouds/3" not in names
    assert items[-1].bad_frames == 1
    assert sum("clouds/3: cannot be read" in record.getMessage() for record in caplog.records) == 1


@dataclasses.dataclass(frozen=True)
class Labelled(Clouds):
    """Frame 17 has a label of no class."""

    class_names = ("road", "car", "tree")

    def frame(self, index, rng=None, *, camera=None):
        frame = super().frame(index, rng)
        labels = np.resize([0, 1, 2, 255], len(frame.points)).astype(np.uint8)
        labels[5] = 7 if index == 17 else 255
        return frame._replace(labels=labels)


@pytest.mark.parametrize("train", [True, False])
def test_a_scene_with_labels_outside_the_classes_is_a_bad_frame(train, caplog):
    """Also when it comes after the scenes that are looked at before training."""
    settings = dataclasses.replace(SETTINGS, task="segment", train=train)
    loader = pipeline(dataset=Labelled(), settings=settings, epochs=None if train else 1)
    steps = loader.steps(CAPACITIES, loader.sample()[0])
    found = [next(steps) for _ in range(12)]
    assert found[-1].bad_frames == 1
    assert re.search(r"clouds/17\b.* 7\b.* 2\b", caplog.text), caplog.text
    labels = [step.batch.labels for step in found] if train else [s.raw_labels for t in found for s in t.scenes[0]]
    assert set(np.unique(np.concatenate([np.ravel(present(part)) for part in labels]))) == {0, 1, 2, 255}


def test_more_than_one_percent_of_bad_frames_stops():
    with pytest.raises(InputError, match=r"2 of 23 frames.* 1 %"):
        run(dataset=Clouds(bad=(3, 8)))


def test_nothing_usable_at_the_beginning_is_said():
    with pytest.raises(InputError, match="clouds/"):
        pipeline(dataset=Clouds(4, bad=(0, 1, 2, 3))).sample()
    with pytest.raises(InputError, match="no frame"):
        pipeline(dataset=Clouds(0))


def test_few_frames_are_sampled_in_several_augmentations():
    """Four frames' tables are as large as their largest turn, which four scenes need not show."""
    found = pipeline(dataset=Clouds(4)).sample()
    assert Counter(scene.name for scene in found) == {f"clouds/{i}": 8 for i in range(4)}
    assert len({float(scene.feats.sum()) for scene in found}) == 32
    assert len(pipeline(dataset=Clouds(4), epochs=1).sample()) == 4


@pytest.mark.parametrize("num_shards", [1, 3, 8])
def test_evaluation_sees_every_frame_once_and_ends(num_shards):
    p = pipeline(epochs=1, num_shards=num_shards, shards=range(num_shards))
    names, empty = [], 0
    for step in p.steps(CAPACITIES, p.sample(4)[0]):
        if step.num_scenes == 0:
            break
        names += [scene.name for scenes in step.scenes for scene in scenes]
        empty += sum(not scenes for scenes in step.scenes)
        assert step.batch.feats.shape[0] == num_shards
    assert sorted(names) == sorted(f"clouds/{i}" for i in range(23))


def test_an_exact_number_of_scenes_a_step():
    p = pipeline(scenes_per_step=4, num_shards=2, shards=range(2))
    steps = p.steps(CAPACITIES, p.sample(4)[0])
    assert [next(steps).num_scenes for _ in range(5)] == [4] * 5
    with pytest.raises(InputError, match=mentions("scenes_per_step", 5, 2)):
        pipeline(scenes_per_step=5, num_shards=2, shards=range(2))


def test_a_step_has_the_smallest_bucket_that_holds_its_scenes():
    """The same scenes in the same rows, with less padding; the smallest is used, and not always."""
    p, whole = pipeline(scenes_per_step=17), Capacities(2048, 17, (2048,) * 3, (8192,) * 3)
    template, shares = p.sample(4)[0], (0.65, 0.5625)
    steps = zip(p.steps(whole, template, shares=shares), p.steps(whole, template), range(7), strict=False)
    rooms, chosen = in_buckets(whole, shares), Counter()
    assert [room.points for room in rooms] == [1152, 1408, 2048]
    for ours, plain, _ in steps:
        assert [scene.name for scene in ours.scenes[0]] == [scene.name for scene in plain.scenes[0]]
        most = sum(len(scene.feats) for scene in ours.scenes[0])
        assert rooms[ours.bucket].points == min(room.points for room in rooms if room.points >= most)
        assert ours.batch.feats.shape[1] == rooms[ours.bucket].points
        for a, b in ((ours.batch.feats, plain.batch.feats), (ours.batch.neighbors, plain.batch.neighbors)):
            np.testing.assert_array_equal(a[:, :most], b[:, :most])
        np.testing.assert_array_equal(ours.batch.scene_points, plain.batch.scene_points)
        chosen[ours.bucket] += 1
    assert len(chosen) > 1
    tight = whole._replace(cells=(2048, 2048, 640))  # a table decides too
    assert next(p.steps(tight, template, shares=shares)).bucket == 2


def test_prefetch_keeps_order_and_passes_errors_on():
    def items():
        yield from range(5)
        raise InputError("over")

    seen = []
    with pytest.raises(InputError, match="over"):
        for item in prefetch(items(), 3):
            seen.append(item)
    assert seen == [0, 1, 2, 3, 4]
    assert list(prefetch(iter(range(4)), 2)) == [0, 1, 2, 3]
