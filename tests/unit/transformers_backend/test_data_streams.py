"""Streams: windows and parts, their split over data ranks, resuming, and what is said about unusable ones."""

from __future__ import annotations

import functools
import json
import pickle
from itertools import islice
from pathlib import Path

import pytest

from tests.texts import (
    assert_resumes,
    build_batches,
    documents_of,
    same,
    tokens_of,
    write_json_lines,
)
from transformers_backend import data
from transformers_backend.data import streams
from transformers_backend.data.streams import RepeatedIterable, merge_positions


@pytest.fixture
def build():
    return build_batches


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("transformers_backend.data.registry._FACTORIES", {})


def write_stream(folder: Path, records: tuple[int, ...] = (6, 6, 6, 6)) -> str:
    """A data set of the hub that stands in for a real one; `records` of each file."""
    for file, count in enumerate(records):
        write_json_lines(folder / f"{file}.jsonl", [{"text": f"{file}-{number}."} for number in range(count)])
    return f"hub/{folder.name}"


@pytest.mark.parametrize(("world_size", "files_of_a_rank"), [(1, 4), (2, 2), (3, 4)])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_record_goes_to_one_rank(tmp_path, build, hub, world_size, files_of_a_rank, num_workers):
    dataset = write_stream(tmp_path / "stream", records=(3, 6, 6, 9))
    parts = [
        documents_of_first_epoch(
            build(dataset=dataset, data_rank=rank, data_world_size=world_size, num_workers=num_workers)
        )
        for rank in range(world_size)
    ]
    names = [f"{file}-{number}." for file, count in enumerate((3, 6, 6, 9)) for number in range(count)]
    assert sorted(name for part in parts for name in part) == names
    assert parts[0] != sorted(parts[0])
    # Whole files where their number is a multiple of the ranks', else every rank reads some records of all files.
    assert [len({name[0] for name in part}) for part in parts] == [files_of_a_rank] * world_size


def documents_of_first_epoch(batches) -> list[str]:
    found = []
    while batches.feeds.state_dicts()[0]["next_epoch"] < 2:
        document = batches.feeds.take(0)
        if batches.feeds.state_dicts()[0]["next_epoch"] < 2:
            found += documents_of(document.tokens.tolist())
    batches.close()
    return found


def test_every_epoch_is_reshuffled(tmp_path, build, hub, monkeypatch):
    monkeypatch.setattr(streams, "SHUFFLE_WINDOW", 6)  # a file
    batches = build(dataset=write_stream(tmp_path / "stream"), seq_len=5, batch_size=24)
    epochs = [documents_of(tokens_of([next(batches)])) for _ in range(3)]
    file_orders = {"".join(name[0] for name in epoch[::6]) for epoch in epochs}
    orders_in_first_file = {"".join(name[2] for name in epoch if name[0] == "0") for epoch in epochs}
    assert len(set(map(tuple, map(sorted, epochs)))) == 1
    assert len(file_orders) == len(orders_in_first_file) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("repeat", [True, False])
def test_resume_is_exact(tmp_path, build, hub, monkeypatch, caplog, world_size, repeat):
    monkeypatch.setattr(streams, "SHUFFLE_WINDOW", 5)
    dataset = write_stream(tmp_path / "stream")
    rank = world_size - 1
    make = functools.partial(build, dataset=dataset, repeat=repeat, data_rank=rank, data_world_size=world_size)
    assert_resumes(make, steps=11)
    assert "shuffle buffer" not in caplog.text


def test_a_worker_gives_what_this_process_would(tmp_path, build, hub, monkeypatch):
    monkeypatch.setattr(streams, "SHUFFLE_WINDOW", 5)
    dataset = write_stream(tmp_path / "stream")
    here, worker = build(dataset=dataset), build(dataset=dataset, num_workers=2)
    assert all(map(same, islice(here, 20), worker))
    assert worker.state_dict() == here.state_dict()
    state = worker.state_dict()
    next_batches = list(islice(worker, 5))
    worker.load_state_dict([state])
    assert all(map(same, next_batches, worker))
    worker.close()


@pytest.mark.parametrize("sizes", [(2, 1, 4), (4, 2), (3, 2, 1), (1, 3)])
def test_another_number_of_ranks_finishes_the_epoch_exactly(tmp_path, build, hub, monkeypatch, sizes):
    """Parts of an epoch are taken over by other ranks; after all have finished it, every record was read once."""
    monkeypatch.setattr(streams, "SHUFFLE_WINDOW", 4)
    dataset = write_stream(tmp_path / "stream", records=(9, 12, 7, 12))
    names = sorted(f"{file}-{number}." for file, count in enumerate((9, 12, 7, 12)) for number in range(count))
    seen, states = [], None
    for size in sizes:
        ranks = [build(dataset=dataset, data_rank=rank, data_world_size=size) for rank in range(size)]
        for rank, batches in enumerate(ranks):
            if states is not None:
                batches.load_state_dict(states)
            for _ in range(2 + 3 * rank):  # ranks are never equally far
                if epoch_to_come(batches) == 0:
                    seen.append(documents_of(batches.feeds.take(0).tokens.tolist())[0])
        states = [json.loads(json.dumps(batches.state_dict())) for batches in ranks]
        assert len(seen) == len(set(seen)) < len(names)
    for batches in ranks:  # what is left
        while epoch_to_come(batches) == 0:
            seen.append(documents_of(batches.feeds.take(0).tokens.tolist())[0])
    assert sorted(seen) == names


def epoch_to_come(batches) -> int:
    """The epoch of the document that comes next."""
    batches.feeds.require_tokens(0, 1)
    feed = batches.feeds._feeds[0]
    if not feed.ready:
        feed.fill()
    return feed.ready[0][3]


def test_ranks_in_different_epochs_leave_whole_parts():
    part = {"epoch": 1, "rank": 0, "world_size": 2, "window": 3, "place": 7, "stream": {"x": 1}}
    late = part | {"epoch": 0, "rank": 1}
    positions = [{"parts": [part], "next_epoch": 2}, {"parts": [late], "next_epoch": 1}]
    begun = {"epoch": 1, "rank": 1, "world_size": 2, "window": 0, "place": 0, "stream": None}
    assert merge_positions(positions, 0, 1) == {"parts": [part, late, begun], "next_epoch": 2}
    assert [merge_positions(positions, rank, 4)["parts"] for rank in range(4)] == [[part], [late], [begun], []]


def test_without_repeat_records_are_in_order(tmp_path, build, hub):
    dataset = write_stream(tmp_path / "stream", records=(3, 3))
    expected = ["0-0.", "0-1.", "0-2.", "1-0.", "1-1.", "1-2."]
    for num_workers in (0, 1):
        batches = build(dataset=dataset, repeat=False, num_workers=num_workers)
        assert documents_of(tokens_of(batches)) == expected
        batches.reset()
        assert documents_of(tokens_of(batches)) == expected
        batches.close()


class _Numbers:
    def __iter__(self):
        return (f"n{number}" for number in range(30))


@pytest.mark.parametrize("rank", [0, 1])
def test_any_iterable_is_split_and_resumed(rank):
    part = RepeatedIterable(_Numbers())
    records = part(7, 1, rank, 2)
    first = list(islice(iter(records), 4))
    state = pickle.loads(pickle.dumps(records.state_dict()))
    again = part(7, 1, rank, 2)
    again.load_state_dict(state)
    assert first + list(again) == [f"n{number}" for number in range(rank, 30, 2)]


class _Texts:
    def __init__(self, texts):
        self.texts = texts

    def __iter__(self):
        return iter(self.texts)


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("kind", ["iterable", "generator"])
def test_a_small_iterable_resumes_wherever_it_was_saved(build, registry, kind, repeat):
    """Also at the end of an epoch, with the whole part in one window."""
    texts = ["abc", "defg", "h" * 20, "ijklmnopq"]
    data.register_dataset("mine", (lambda split: _Texts(texts)) if kind == "iterable" else (lambda split: iter(texts)))
    assert_resumes(functools.partial(build, dataset="mine", repeat=repeat), steps=12 if repeat else 3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_generator_is_made_anew_for_every_pass(build, registry, num_workers):
    """None of its documents is lost by a look at the first ones, a resume, a reset or the end of an epoch."""
    names = [f"n{number:04d}" for number in range(1500)]
    data.register_dataset("mine", lambda split: (name for name in names))
    batches = build(dataset="mine", num_workers=num_workers, seq_len=6, batch_size=1500)
    state = batches.state_dict()
    epochs = [documents_of(tokens_of([next(batches)])) for _ in range(2)]
    batches.load_state_dict([state])
    epochs.append(documents_of(tokens_of([next(batches)])))
    batches.reset()
    epochs.append(documents_of(tokens_of([next(batches)])))
    batches.close()
    assert [sorted(epoch) for epoch in epochs] == [names] * 4


def test_the_same_iterator_again_is_refused(build, registry):
    shared = iter(["some text"] * 9)
    data.register_dataset("mine", lambda split: shared)
    with pytest.raises(ValueError, match=r'"mine": called again, it returned the same iterator .*inside the function'):
        build(dataset="mine")


def test_a_stream_comes_in_chunks_as_large_as_a_collections(build, registry):
    """What training.prefetch_factor counts: some 65,000 tokens, whatever is read."""
    data.register_dataset("mine", lambda split: ("x" * 999 for _ in range(200)))
    batches = build(dataset="mine")
    assert len(batches.feeds._feeds[0].ready) == 66


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_stream_that_cannot_be_opened(build, cache, monkeypatch):
    import datasets

    def fail(*arguments, **keywords):
        raise FileNotFoundError("Dataset 'no/such' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r'dataset = "no/such" .*"python_stdlib" or a dataset of the.*dataset_path'):
        build(dataset="no/such")


def test_an_alias_and_a_configuration_of_its_own(build, hub, monkeypatch):
    import datasets

    opened = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: opened.append((*a, k["name"])) or 1 / 0)
    with pytest.raises(ValueError, match=r'dataset_name = "realnewslike": dataset = "c4" stands for "allenai/c4" with'):
        build(dataset="c4", dataset_name="realnewslike")
    for name in (None, "en"):
        with pytest.raises(ZeroDivisionError):
            build(dataset="c4", dataset_name=name)
    assert opened == [("allenai/c4", "en")] * 2


def test_streaming_needs_a_recent_datasets_package(build, cache, monkeypatch):
    monkeypatch.setattr("datasets.__version__", "4.8.1")
    with pytest.raises(ImportError, match=r"datasets >= 5, found 4.8.1"):
        build(dataset="no/such")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_records_that_are_unusable(tmp_path, build, hub, num_workers):
    write_json_lines(tmp_path / "bodies" / "x.jsonl", [{"body": "a", "title": "b"}])
    with pytest.raises(ValueError, match=r'text_column = "text": must be a column of .*which has body, title'):
        build(dataset="hub/bodies", num_workers=num_workers)
    write_json_lines(tmp_path / "numbers" / "x.jsonl", [{"text": 5}])
    with pytest.raises(ValueError, match=r'numbers": record .* cannot be tokenized: .*of type int: must be a string'):
        build(dataset="hub/numbers", num_workers=num_workers)
    write_json_lines(tmp_path / "empty" / "x.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match=r'empty": data rank 0 of 1 gets no text in an epoch'):
        build(dataset="hub/empty", num_workers=num_workers)


def test_a_file_of_a_stream_that_vanishes(tmp_path, build, hub, monkeypatch):
    monkeypatch.setattr(streams, "SHUFFLE_WINDOW", 2)
    batches = build(dataset=write_stream(tmp_path / "stream"))
    for path in (tmp_path / "stream").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r'stream": reading stopped \(FileNotFoundError.*resume from the last check'):
        list(islice(batches, 100))
