"""Evaluation: what is counted, in which order, by whom, and how much is held meanwhile."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from test_losses import _free_port
from test_training import model

import segvit
from segvit.data import Shapes
from segvit.data.dataset import SegmentationDataset
from segvit.evaluation import AHEAD, evaluate
from segvit.report import SHOWN, Collector

SOME = 5


class Broken(Shapes):
    """Shapes of which some cannot be read."""

    def __init__(self, length, broken, error=ValueError, size=48):
        super().__init__(length, size)
        self.broken, self.error = broken, error

    def __getitem__(self, i):
        if i in self.broken:
            raise self.error(f"no such\nthing as {i}")
        return super().__getitem__(i)


class Foreign(RuntimeError):
    """An error that does not survive pickling."""

    def __init__(self, message):
        super().__init__(message)
        self.held = lambda: None


class Sized(Shapes):
    """Every image of another size."""

    def __getitem__(self, i):
        image, labels = super().__getitem__(i)
        return image[:, : 32 + i], labels[: 32 + i]


class Tracked(Shapes):
    """Knows how many of the tensors it gave are alive, and were at most."""

    def __init__(self, length):
        super().__init__(length, 32)
        self.given, self.most = weakref.WeakSet(), 0

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        for tensor in sample:
            self.given.add(tensor)
        self.most = max(self.most, len(self.given))
        return sample


class Counted(Shapes):
    """Counts in shared memory what was read, in whatever process."""

    def __init__(self, length):
        super().__init__(length, 32)
        self.read = mp.get_context("fork").Value("i", 0)

    def __getitem__(self, i):
        with self.read.get_lock():
            self.read.value += 1
        return super().__getitem__(i)


def same(a, b) -> bool:
    """Scores are equal; NaN equals NaN."""
    return repr(a) == repr(b)


def test_evaluate_is_the_confusion_of_predictions():
    m, data = model().eval(), Shapes(4, 48)
    scores = evaluate(m, data, progress=False)
    confusion = torch.zeros(6, 7, dtype=torch.int64)
    for image, labels in (data[i] for i in range(4)):
        predicted = segvit.predict(m, image)[0].long()
        for t, p in zip(labels[labels != 255].tolist(), predicted[labels != 255].tolist()):
            confusion[t, p] += 1
    assert scores.confusion == confusion.tolist()
    assert scores.aacc == pytest.approx((confusion.diagonal().sum() / confusion.sum()).item())
    assert scores.left_out == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_come_in_order_and_of_any_size_whoever_reads_them(workers):
    m, data, seen = model().eval(), Sized(SOME, 48), []
    before = torch.get_rng_state()
    scores = evaluate(m, data, progress=False, workers=workers, watch=lambda *sample: seen.append(sample))
    assert torch.equal(torch.get_rng_state(), before)
    assert [i for i, *_ in seen] == list(range(SOME))
    for i, image, labels, predicted in seen:
        assert torch.equal(image, data[i][0])
        assert torch.equal(labels, data[i][1])
        assert torch.equal(predicted, segvit.predict(m, image)[0])
    assert same(scores, evaluate(m, data, progress=False))


@pytest.mark.parametrize("watched", [False, True])
def test_what_is_held_does_not_grow_with_the_number_of_images(watched):
    m, most = model().eval(), []
    for length in (8, 40):
        data, collector = Tracked(length), Collector(6)
        gc.collect()
        gc.disable()  # what only the collector of cycles would free counts as held
        try:
            evaluate(m, data, progress=False, watch=collector if watched else None)
        finally:
            gc.enable()
        most.append(data.most)
        assert len(collector.worst()) + len(collector.best()) <= 2 * SHOWN
    assert most[0] == most[1]
    assert 2 <= most[1] <= 4  # the sample that is read, and the one before


def test_workers_read_ahead_a_few_images_and_not_the_whole_set():
    data, ahead = Counted(30), []

    def watch(i, *_):
        ahead.append(data.read.value - (i + 1))

    evaluate(model().eval(), data, progress=False, workers=2, watch=watch)
    assert data.read.value == 30
    assert max(ahead) <= 2 * AHEAD


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("error", "kind"), [(ValueError, ValueError), (OSError, OSError), (Foreign, RuntimeError)])
def test_a_sample_that_cannot_be_read(workers, error, kind, capsys):
    m, data = model().eval(), Broken(4, {1, 3}, error)
    with pytest.raises(kind, match=r"^no such\sthing as 1$"):
        evaluate(m, data, progress=False, workers=workers)
    assert not capsys.readouterr().err
    seen = []
    scores = evaluate(
        m, data, progress=False, workers=workers, strict=False, watch=lambda i, *rest: seen.append((i, *rest[:2]))
    )
    assert scores.left_out == 2
    assert [i for i, *_ in seen] == [0, 2]
    assert sum(scores.pixels) == sum(int((labels != 255).sum()) for _, _, labels in seen)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"left out: sample {i}: no such thing as {i}" for i in (1, 3)]
    assert not captured.out


def test_other_errors_are_never_left_out():
    with pytest.raises(KeyError):
        evaluate(model(), Broken(2, {1}, KeyError), progress=False, strict=False)


def test_a_set_of_which_nothing_can_be_read_is_an_error():
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        evaluate(model(), Broken(3, {0, 1, 2}), progress=False, strict=False)


def test_a_file_that_is_left_out_is_named_once(tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    Image.new("L", (32, 32)).save(tmp_path / "labels.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    pairs = [(tmp_path / name, tmp_path / "labels.png") for name in ("good.png", "bad.png")]
    data = SegmentationDataset(pairs, Shapes.classes)
    assert evaluate(model(), data, progress=False, strict=False).left_out == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out: {tmp_path / 'bad.png'}: not a readable image")

    class Silent(SegmentationDataset):
        def __getitem__(self, i):
            if i == 1:
                raise ValueError
            return super().__getitem__(i)

    evaluate(model(), Silent(pairs, Shapes.classes), progress=False, strict=False)
    assert capsys.readouterr().err == f"left out: {tmp_path / 'bad.png'}: ValueError\n"


def test_stopping_ends_an_evaluation():
    asked = iter([False, True])
    with pytest.raises(KeyboardInterrupt, match="stopped during an evaluation"):
        evaluate(model(), Shapes(4, 32), progress=False, stopped=lambda: next(asked))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"processes": (2, 2)}, r"processes must be \(rank, count\) with 0 <= rank < count, got \(2, 2\)"),
        ({"mode": "tiles"}, "mode must be one of"),
    ],
)
def test_bad_input_gets_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model(), Shapes(1, 32), progress=False, **options)


def _share(rank: int, port: int, weights: dict, cases: list, results) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        m = model().eval()
        m.load_state_dict(weights)
        for n, (data, options) in enumerate(cases):
            seen = []
            scores = evaluate(
                m,
                data,
                progress=False,
                processes=(rank, 2),
                watch=lambda i, *_, seen=seen: seen.append(i),
                **options,
            )
            results[n, rank] = (scores, seen)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_return_the_scores_of_one():
    m = model().eval()
    cases = [
        (Sized(SOME, 48), {"boundary": 0.05}),
        (Broken(SOME, {0, 3}), {"strict": False, "workers": 1}),
        (Shapes(1, 48), {"boundary": 0.05}),  # the second process has nothing to do
    ]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_share, (_free_port(), m.state_dict(), cases, results), nprocs=2)
        results = dict(results)
    for n, (data, options) in enumerate(cases):
        want = evaluate(m, data, progress=False, **options)
        assert sum(want.pixels)
        assert all(same(results[n, rank][0], want) for rank in (0, 1))
    assert [results[0, rank][1] for rank in (0, 1)] == [[0, 2, 4], [1, 3]]
    assert [results[1, rank][1] for rank in (0, 1)] == [[2, 4], [1]]
    assert [results[2, rank][1] for rank in (0, 1)] == [[0], []]
