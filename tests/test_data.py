"""Datasets, samplers and the DataLoader: order, batches, workers, errors."""

import threading
import time
from collections import namedtuple

import numpy as np
import pytest

from jitgrad import data
from jitgrad.functional.random import Generator
from jitgrad.tensor import Tensor

Point = namedtuple("Point", "x y")


class Squares(data.Dataset):
    def __init__(self, count, delay=0.0):
        self.count, self.delay = count, delay

    def __getitem__(self, index):
        time.sleep(self.delay * (index % 3))
        return {"x": np.float32(index), "y": index ** 2, "name": str(index)}

    def __len__(self):
        return self.count


class Counting(data.IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        info = data.get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        return iter(range(first, self.count, step))


def table(count=10):
    features = np.arange(count * 2, dtype=np.float32).reshape(count, 2)
    return data.TensorDataset(Tensor(features), Tensor(np.arange(count)))


def labels(loader):
    return [batch[1].tolist() for batch in loader]


# --- datasets --------------------------------------------------------------------------------------------------------

def test_tensor_dataset_and_its_combinations():
    dataset = table(4) + table(3)
    assert len(dataset) == 7 and dataset[5][1].item() == 1 and dataset[-1][1].item() == 2
    assert data.Subset(dataset, [6, 0])[0][1].item() == 2
    assert list(Counting(2) + Counting(3)) == [0, 1, 0, 1, 2]
    with pytest.raises(IndexError, match="out of range for 7"):
        dataset[7]
    with pytest.raises(ValueError, match="4, 3"):
        data.TensorDataset(Tensor(np.zeros(4)), Tensor(np.zeros(3)))
    with pytest.raises(TypeError, match="ChainDataset"):
        data.ConcatDataset([Counting(2)])


def test_random_split():
    parts = data.random_split(table(10), [0.5, 0.25, 0.25], Generator().manual_seed(1))
    assert [len(part) for part in parts] == [6, 2, 2]
    assert sorted(i for part in parts for i in part.indices) == list(range(10))
    again = data.random_split(table(10), [6, 2, 2], Generator().manual_seed(1))
    assert [part.indices for part in parts] == [part.indices for part in again]
    with pytest.raises(ValueError, match="sum to 9"):
        data.random_split(table(10), [5, 4])


# --- samplers --------------------------------------------------------------------------------------------------------

def test_samplers():
    assert list(data.SequentialSampler(range(3))) == [0, 1, 2]
    shuffled = data.RandomSampler(range(50), generator=Generator().manual_seed(3))
    first, second = list(shuffled), list(shuffled)
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert list(data.RandomSampler(range(50), generator=Generator().manual_seed(3))) == first
    assert len(list(data.RandomSampler(range(5), num_samples=12))) == 12
    drawn = list(data.RandomSampler(range(5), replacement=True, num_samples=1000))
    assert set(drawn) == set(range(5))
    assert sorted(data.SubsetRandomSampler([7, 8, 9])) == [7, 8, 9]
    assert list(data.BatchSampler(range(5), 2, False)) == [[0, 1], [2, 3], [4]]
    assert list(data.BatchSampler(range(5), 2, True)) == [[0, 1], [2, 3]]
    assert len(data.BatchSampler(range(5), 2, True)) == 2
    with pytest.raises(ValueError, match="batch_size"):
        data.BatchSampler(range(5), 0, False)


def test_weighted_sampler_draws_in_proportion():
    drawn = np.array(list(data.WeightedRandomSampler([1, 0, 3], 4000, generator=Generator().manual_seed(0))))
    assert set(drawn) == {0, 2} and (drawn == 2).mean() == pytest.approx(0.75, abs=0.03)
    firsts = [next(iter(data.WeightedRandomSampler([1, 0, 3], 2, replacement=False))) for _ in range(400)]
    assert set(firsts) == {0, 2} and np.mean(np.array(firsts) == 2) == pytest.approx(0.75, abs=0.08)
    assert sorted(data.WeightedRandomSampler([1, 0, 3], 2, replacement=False)) == [0, 2]
    with pytest.raises(ValueError, match="without replacement"):
        data.WeightedRandomSampler([1, 0, 3], 3, replacement=False)


# --- collating -------------------------------------------------------------------------------------------------------

def test_nested_samples_are_collated_entry_by_entry():
    batch = data.default_collate([{"p": Point(1, 2.5), "t": (Tensor(np.ones(2)), "a"), "l": [True]} for _ in range(3)])
    assert type(batch["p"]) is Point and batch["p"].x.tolist() == [1, 1, 1] and batch["p"].y.numpy().dtype == np.float64
    assert batch["t"][0].shape == (3, 2) and batch["t"][1] == ["a"] * 3 and batch["l"][0].tolist() == [True] * 3
    with pytest.raises(TypeError, match="found object"):
        data.default_collate([object()])
    with pytest.raises(RuntimeError, match="different lengths"):
        data.default_collate([[1], [1, 2]])
    with pytest.raises(RuntimeError, match="different shapes"):
        data.default_collate([Tensor(np.ones(2)), Tensor(np.ones(3))])


# --- loader ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [0, 3])
def test_batches_in_order(workers):
    loader = data.DataLoader(Squares(10, delay=0.002), batch_size=4, num_workers=workers)
    batches = list(loader)
    assert len(loader) == 3 and [b["y"].tolist() for b in batches] == [[0, 1, 4, 9], [16, 25, 36, 49], [64, 81]]
    assert batches[0]["name"] == ["0", "1", "2", "3"] and batches[0]["x"].numpy().dtype == np.float32


def test_fast_path_gives_what_the_plain_path_gives():
    subset = data.Subset(data.Subset(table(), [9, 8, 7, 6, 5]), [0, 2, 4])
    for dataset in (table(), subset):
        fast = data.DataLoader(dataset, batch_size=2)
        plain = data.DataLoader(dataset, batch_size=2, collate_fn=lambda samples: data.default_collate(samples))
        assert labels(fast) == labels(plain)
        for a, b in zip(fast, plain):
            np.testing.assert_array_equal(a[0].numpy(), b[0].numpy())
    batch = next(iter(data.DataLoader(table(), batch_size=4)))
    batch[0].zero_()
    assert table().tensors[0].numpy().any()


def test_shuffle_is_new_each_epoch_and_repeatable():
    def build():
        generator = Generator().manual_seed(5)
        return data.DataLoader(table(30), batch_size=7, shuffle=True, drop_last=True, generator=generator)

    loader = build()
    first, second = labels(loader), labels(loader)
    assert len(first) == len(loader) == 4 and first != second
    assert labels(build()) == first


def test_samples_without_batches_and_own_samplers():
    assert [s["y"] for s in data.DataLoader(Squares(3), batch_size=None)] == [0, 1, 4]
    assert labels(data.DataLoader(table(), batch_size=2, sampler=[3, 1, 2])) == [[3, 1], [2]]
    assert labels(data.DataLoader(table(), batch_sampler=[[3, 1], [2]])) == [[3, 1], [2]]


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_iterable_datasets(workers):
    loader = data.DataLoader(Counting(7), batch_size=2, num_workers=workers)
    batches = [b.tolist() for b in loader]
    assert sorted(x for b in batches for x in b) == list(range(7))
    if workers == 2:
        assert batches == [[0, 2], [1, 3], [4, 6], [5]]


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_name_the_sample(workers):
    class Broken(Squares):
        def __getitem__(self, index):
            if index == 5:
                raise KeyError("no such file")
            return index

    loader, seen = data.DataLoader(Broken(8), batch_size=2, num_workers=workers), []
    with pytest.raises(KeyError, match="no such file") as error:
        for batch in loader:
            seen.append(batch.tolist())
    assert seen == [[0, 1], [2, 3]] and "sample 5" in error.value.__notes__[0]
    with pytest.raises(RuntimeError) as error:
        list(data.DataLoader([np.ones(2), np.ones(3)], batch_size=2, collate_fn=_fail))
    assert "[0, 1]" in error.value.__notes__[0]


def _fail(samples):
    raise RuntimeError("cannot collate")


def test_workers_are_initialized_once_and_stopped():
    begun, before = [], threading.active_count()

    def begin(worker):
        begun.append((worker, data.get_worker_info().num_workers))

    loader = data.DataLoader(Squares(8), batch_size=2, num_workers=2, worker_init_fn=begin)
    list(loader)
    list(loader)
    assert sorted(begun) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    begun.clear()
    loader = data.DataLoader(Squares(8), batch_size=2, num_workers=2, worker_init_fn=begin, persistent_workers=True)
    assert len(list(loader)) == len(list(loader)) == 4 and sorted(begun) == [(0, 2), (1, 2)]
    del loader
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_failing_worker_init_is_reported():
    def begin(worker):
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        list(data.DataLoader(Squares(4), num_workers=2, worker_init_fn=begin))


def test_leaving_early_cancels_what_is_ahead():
    class Noting(Squares):
        asked = 0

        def __getitem__(self, index):
            self.asked += 1
            return index

    dataset = Noting(1000)
    for _ in data.DataLoader(dataset, num_workers=2):
        break
    time.sleep(0.05)
    assert dataset.asked < 20


def test_a_timeout_is_an_error():
    with pytest.raises(RuntimeError, match="no batch within"):
        list(data.DataLoader(Squares(3, delay=0.2), num_workers=1, timeout=0.02))


def test_contradicting_options_are_refused():
    for options in ({"shuffle": True, "sampler": [1]}, {"num_workers": -1}, {"persistent_workers": True},
                    {"batch_sampler": [[1]], "batch_size": 3}, {"batch_size": 0},
                    {"batch_size": None, "drop_last": True}):
        with pytest.raises(ValueError):
            data.DataLoader(table(), **options)
    with pytest.raises(ValueError, match="IterableDataset"):
        data.DataLoader(Counting(3), shuffle=True)
