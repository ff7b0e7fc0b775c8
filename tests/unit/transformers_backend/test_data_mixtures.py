"""Weighted sources and stages: proportions, the exact step of a switch, resuming, and registered names."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from tests.texts import (
    EOS,
    IGNORED,
    OFFSET,
    assert_resumes,
    build_batches,
    of_all_ranks,
    tokens_of,
    write_json_lines,
    write_text_files,
)
from transformers_backend import register_dataset
from transformers_backend.data import SourceKeys, Stage


@pytest.fixture
def sources(tmp_path) -> dict[str, SourceKeys]:
    """Three sources, of one letter each; documents of "a" are long, of "b" short, of "c" mixed."""
    texts = {"a": ["a" * 40] * 9, "b": ["b" * 3] * 30, "c": ["c" * length for length in range(1, 20)]}
    return {name: SourceKeys(dataset_path=str(write_text_files(tmp_path / name, texts[name]))) for name in texts}


def shares_of(batches) -> dict[str, float]:
    """Part of the tokens that each letter has, end tokens left out."""
    text = "".join(chr(token - OFFSET) for token in tokens_of(batches) if token != EOS)
    return {letter: text.count(letter) / len(text) for letter in "abc"}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("rank", [0, 1])
def test_weights_are_shares_of_tokens(sources, num_workers, rank):
    stages = [Stage(1, (5.0, 3.0, 2.0))]
    batches = build_batches(sources=sources, stages=stages, num_workers=num_workers, data_rank=rank, data_world_size=2)
    taken = [0, 0, 0]
    for _ in islice(batches, 400):
        taken = list(batches.state_dict()["tokens_taken"].values())
    batches.close()
    assert sum(taken) == pytest.approx(400 * 16, abs=41)
    # The source that is behind comes next, so that none is ever more than a document ahead.
    assert [part / sum(taken) for part in taken] == pytest.approx([0.5, 0.3, 0.2], abs=41 / sum(taken))
    if num_workers:
        here = build_batches(sources=sources, stages=stages, data_rank=rank, data_world_size=2)
        list(islice(here, 400))
        assert here.state_dict() == batches.state_dict()


STAGES = (Stage(1, (1.0, 0.0, 0.0)), Stage(4, (0.0, 1.0, 1.0)), Stage(6, (1.0, 0.0, 1.0)))


def letters_of(batch) -> set[str]:
    return {chr(token - OFFSET) for token in batch["input_ids"].flatten().tolist() if token > 2}


@pytest.mark.parametrize("per_step", [1, 3])
def test_a_stage_begins_exactly_with_its_step(tmp_path, per_step):
    """Documents of 8 tokens fill blocks exactly: no rest of a document reaches into the next stage."""
    paths = {name: write_text_files(tmp_path / name, [name * 7] * 40) for name in "abc"}
    sources = {name: SourceKeys(dataset_path=str(path)) for name, path in paths.items()}
    batches = build_batches(sources=sources, stages=STAGES, batches_per_step=per_step)
    steps = [set().union(*(letters_of(batch) for batch in islice(batches, per_step))) for _ in range(7)]
    assert steps == [{"a"}] * 3 + [{"b", "c"}] * 2 + [{"a", "c"}] * 2


def test_the_rest_of_a_document_is_finished_in_the_next_stage(sources):
    batches = build_batches(sources=sources, stages=STAGES[:2])
    text = "".join(chr(token - OFFSET) for token in tokens_of(islice(batches, 12)) if token != EOS)
    assert text.startswith("a" * 80 + "b" * 3 + "c"), "3 steps are 48 tokens: the second document had been begun"


@pytest.mark.parametrize("per_step", [1, 2])
def test_resume_is_exact_in_every_stage(sources, per_step):
    assert_resumes(lambda: build_batches(sources=sources, stages=STAGES, batches_per_step=per_step), steps=16)


def test_a_stage_begins_at_its_step_on_another_number_of_ranks(sources):
    """Two ranks with one batch a step become one rank with two: the stage's step counts, not its batches."""
    two = [build_batches(sources=sources, stages=STAGES, data_rank=rank, data_world_size=2) for rank in range(2)]
    for batches in two:
        list(islice(batches, 4))
    states = [json.loads(json.dumps(batches.state_dict())) for batches in two]
    assert [state["stage"] for state in states] == [1, 1]
    one = build_batches(sources=sources, stages=STAGES, batches_per_step=2)
    one.load_state_dict(states)
    merged = one.state_dict()
    assert merged["batches"] == 8
    assert merged["tokens_taken"] == {
        name: sum(state["tokens_taken"][name] for state in states) for name in ("a", "b", "c")
    }
    next(one), next(one)
    assert one.state_dict()["stage"] == 1
    next(one)
    assert one.state_dict()["stage"] == 2


def test_sources_may_be_added_and_not_removed(sources):
    fewer = {name: sources[name] for name in ("a", "b")}
    before = build_batches(sources=fewer)
    list(islice(before, 9))
    after = build_batches(sources=sources)
    after.load_state_dict([before.state_dict()])
    assert after.state_dict()["sources"]["a"] == before.state_dict()["sources"]["a"]
    assert after.state_dict()["sources"]["c"]["taken"] == 0
    with pytest.raises(ValueError, match=r"other data: c.dataset = 'c' there and None here.*left out of a stage"):
        build_batches(sources=fewer).load_state_dict([after.state_dict()])


def taken_later(batches, before: dict[str, int], steps: int) -> dict[str, int]:
    list(islice(batches, steps))
    now = batches.state_dict()["tokens_taken"]
    return {name: now[name] - before.get(name, 0) for name in now}


def test_shares_hold_at_once_where_a_resume_changes_them(sources):
    """A source that is new, or weighs more, is not read alone until it has caught up with the past."""
    before = build_batches(sources={name: sources[name] for name in "ab"})
    list(islice(before, 200))
    state = before.state_dict()
    added = build_batches(sources=sources)
    added.load_state_dict([state])
    parts = taken_later(added, {}, 60)
    assert [parts[name] / sum(parts.values()) for name in "abc"] == pytest.approx([1 / 3] * 3, abs=0.05)
    heavier = build_batches(sources={name: sources[name] for name in "ab"}, stages=[Stage(1, (1.0, 4.0))])
    heavier.load_state_dict([state])
    parts = taken_later(heavier, {}, 60)
    assert parts["a"] / sum(parts.values()) == pytest.approx(0.2, abs=0.05)
    same_weights = build_batches(sources=sources, stages=[Stage(1, (1.0, 1.0, 0.0))])
    same_weights.load_state_dict([state])
    assert same_weights.state_dict()["tokens_taken"] == state["tokens_taken"] | {"c": 0}


def test_every_source_is_tried_before_the_run(sources, tmp_path, cache):
    path = write_json_lines(tmp_path / "x.jsonl", [{"text": ""}])
    late = [Stage(1, (1.0, 1.0, 1.0, 0.0)), Stage(1000, (0.0, 0.0, 0.0, 1.0))]
    with pytest.raises(ValueError, match=r'source "late": dataset_path = ".*x.jsonl": data rank 0 of 1 gets 0 tokens'):
        build_batches(sources=sources | {"late": SourceKeys(dataset_path=str(path))}, stages=late)


def test_streams_and_collections_mix(sources, tmp_path, hub):
    write_json_lines(tmp_path / "stream" / "0.jsonl", [{"text": "c" * number} for number in range(1, 30)])
    mixed = {"a": sources["a"], "stream": SourceKeys(dataset="hub/stream")}
    for num_workers in (0, 1):
        batches = build_batches(sources=mixed, num_workers=num_workers)
        assert shares_of(islice(batches, 100)) == pytest.approx({"a": 0.5, "b": 0, "c": 0.5}, abs=0.05)
        state = batches.state_dict()
        expected = [batch["input_ids"].tolist() for batch in islice(batches, 4)]
        batches.load_state_dict([json.loads(json.dumps(state))])
        assert [batch["input_ids"].tolist() for batch in islice(batches, 4)] == expected
        batches.close()


def test_a_registered_name(sources, monkeypatch):
    monkeypatch.setattr("transformers_backend.data.registry._FACTORIES", {})
    register_dataset("letters", lambda split: [f"{split} {letter}" for letter in "xyz"])
    (batch,) = build_batches(dataset="letters", dataset_split="test", seq_len=12, repeat=False)
    tokens = [token for token in batch["labels"].flatten().tolist() if token != IGNORED]
    assert bytes(token - OFFSET for token in tokens if token != EOS) == b"test xtest ytest z"
    for name in ("", "a/b", "a:b"):
        with pytest.raises(ValueError, match=r"register_dataset\(.*a name must not be empty or hold"):
            register_dataset(name, list)
    for name in ("python_stdlib", "c4"):
        with pytest.raises(ValueError, match=rf'register_dataset\("{name}", .*has a meaning already. Choose another'):
            register_dataset(name, list)


def test_states_are_of_the_ranks_in_order(sources):
    state = build_batches(sources=sources, data_rank=1, data_world_size=2).state_dict()
    with pytest.raises(AssertionError, match="all ranks, in order"):
        build_batches(sources=sources).load_state_dict([state])
    build_batches(sources=sources, data_rank=1, data_world_size=2).load_state_dict(of_all_ranks(state))
