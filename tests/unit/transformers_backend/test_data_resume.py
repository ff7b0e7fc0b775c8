"""Resuming: exactly the next batch on as many data ranks, and every token once on another number of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from tests.texts import (
    EOS,
    OFFSET,
    assert_resumes,
    build_batches,
    documents_of,
    of_all_ranks,
    same,
    tokens_of,
    write_text_files,
)
from transformers_backend.data.order import Cursor, documents_at, merge_cursors

# --- the order of documents -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 17, 1000, 65_537])
def test_every_epoch_has_each_document_once(count):
    epochs = [documents_at(np.arange(count) + epoch * count, count, seed=7) for epoch in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs)
    if count > 16:
        assert len({tuple(epoch.tolist()) for epoch in [*epochs, np.arange(count)]}) == 4
        assert abs(np.corrcoef(epochs[0], np.arange(count))[0, 1]) < 4 / count**0.5
        other_seed = documents_at(np.arange(count), count, seed=8)
        assert np.sum(other_seed == epochs[0]) < 10


def test_all_orders_of_a_few_documents_come_up():
    orders = Counter(tuple(documents_at(np.arange(3) + 3 * epoch, 3, seed=7).tolist()) for epoch in range(1200))
    assert len(orders) == 6
    assert min(orders.values()) > 150  # 200 each on average; 3.9 standard deviations


def test_places_of_a_huge_source_are_computed_not_held():
    count = 10**12
    numbers = documents_at(np.arange(count - 5, count + 5), count, seed=3)
    assert len(set(numbers.tolist())) == 10
    assert 0 <= numbers.min() < numbers.max() < count
    assert documents_at(np.arange(count - 1, count + 2), count, seed=None).tolist() == [count - 1, 0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_merged_cursors_lose_no_place_and_give_none_twice(seed):
    """Any numbers of ranks one after another, each rank stopping where it likes."""
    chance = random.Random(seed)
    taken, states = [], None
    for _ in range(6):
        world_size = chance.randint(1, 7)
        cursors = [Cursor(r, world_size) if states is None else merge_cursors(states, r, world_size)
                   for r in range(world_size)]  # fmt: skip
        assert len({(cursor.holes, cursor.next) for cursor in cursors}) == 1
        for cursor in cursors:
            count = chance.choice([0, 1, 5, 40])
            taken += cursor.places(0, count).tolist()
            cursor.taken = count
        states = [json.loads(json.dumps(cursor.state_dict())) for cursor in cursors]
    last = merge_cursors(states, 0, 1)
    assert len(set(taken)) == len(taken)
    assert sorted([*taken, *last.holes]) == list(range(last.next)), "what was not taken is known"


# --- the same number of ranks ---------------------------------------------------------------------------------------


@pytest.fixture
def build():
    return build_batches


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_resume_is_exact(tmp_path, build, repeat, packing):
    path = write_text_files(tmp_path / "texts", ["x" * number + str(number) for number in range(1, 20)])
    assert_resumes(lambda: build(path, repeat=repeat, data_rank=1, data_world_size=2, packing=packing), steps=12)


def test_state_is_plain(tmp_path, build):
    batches = build(write_text_files(tmp_path / "texts", ["abcdefghij", "klmnopq"]))
    next(batches)
    assert json.loads(json.dumps(batches.state_dict())) == batches.state_dict()


def test_resume_after_the_end_stays_at_the_end(tmp_path, build):
    path = write_text_files(tmp_path / "texts", ["abc"])
    ended = build(path, repeat=False)
    assert len(list(ended)) == 1
    resumed = build(path, repeat=False)
    resumed.load_state_dict([ended.state_dict()])
    assert list(resumed) == []


def test_resume_in_moved_data(tmp_path, build):
    path = write_text_files(tmp_path / "texts", ["abcdefghij", "klmnopq"])
    before = build(path)
    next(before)
    (tmp_path / "elsewhere").mkdir()
    after = build(path.rename(tmp_path / "elsewhere" / "texts"))
    after.load_state_dict([before.state_dict()])
    assert after.state_dict() == before.state_dict()


def test_resume_in_other_data_is_refused(tmp_path, build):
    state = build(write_text_files(tmp_path / "texts", ["abcdefghij"] * 4)).state_dict()
    with pytest.raises(
        ValueError, match=r"other data: dataset = 'texts' there and 'more' here; documents = 4 .* and 5"
    ):
        build(write_text_files(tmp_path / "more", ["abcdefghij"] * 5)).load_state_dict([state])
    with pytest.raises(ValueError, match=r"other data: seed = 7 there and 8 here"):
        build(tmp_path / "texts", seed=8).load_state_dict([state])
    (tmp_path / "texts" / "000.txt").write_text("another length")
    with pytest.raises(ValueError, match=r"other data: files = "):
        build(tmp_path / "texts").load_state_dict([state])


def test_resume_with_another_tokenizer_of_the_same_kind_and_size_is_refused(tmp_path, build):
    path = write_text_files(tmp_path / "texts", ["abcdefghij"] * 4)
    state, other = build(path).state_dict(), ByT5Tokenizer()
    other.eos_token = "<unk>"
    with pytest.raises(ValueError, match=r"other data: tokenizer = 'ByT5Tokenizer with 384 tokens, .* and 'ByT5Token"):
        build(path, tokenizer=other).load_state_dict([state])


# --- another number of ranks ----------------------------------------------------------------------------------------


def ranks_of(build, path, size, states=None, **changes):
    ranks = [build(path, data_rank=rank, data_world_size=size, **changes) for rank in range(size)]
    for batches in ranks if states else ():
        batches.load_state_dict(states)
    return ranks


def saved(ranks) -> list[dict]:
    return [json.loads(json.dumps(batches.state_dict())) for batches in ranks]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_two_then_one_then_four_ranks_read_one_epoch(tmp_path, build, num_workers):
    """Documents fill blocks exactly, so that each is recorded whole: 48 documents of 8 tokens are 24 blocks of 16."""
    names = [f"doc-{number:03d}" for number in range(48)]
    path = write_text_files(tmp_path / "texts", names)
    seen, states = [], None
    for size, steps in ((2, 4), (1, 8), (4, 2)):
        ranks = ranks_of(build, path, size, states, seq_len=16, batch_size=1, num_workers=num_workers)
        for batches in ranks:
            seen += documents_of(tokens_of(islice(batches, steps)))
        states = saved(ranks)
        for batches in ranks:
            batches.close()
    assert sorted(seen) == names


@pytest.mark.parametrize("seed", range(6))
def test_tokens_are_exact_whatever_the_ranks(tmp_path, build, seed):
    """Documents of any length, ranks that are not equally far, and tokens that wait for their batch at every resume."""
    chance = random.Random(seed)
    lengths = [chance.choice([1, 3, 8, 20, 90]) for _ in range(150)]
    texts = [chr(33 + number % 90) * length for number, length in enumerate(lengths)]
    path = write_text_files(tmp_path / "texts", texts)
    taken, states = [], None
    for _ in range(4):
        ranks = ranks_of(build, path, chance.choice([1, 2, 3, 5]), states, batch_size=1)
        steps = chance.randint(0, 5)
        for batches in ranks:
            taken += tokens_of(islice(batches, steps))
        states = saved(ranks)
    taken += [token for state in states for piece in state["leftover"] for token in piece["tokens"]]
    (cursor,) = (merge_cursors([state["sources"][""] for state in states], 0, 1),)
    behind = sorted(set(range(cursor.next)) - set(cursor.holes))
    assert cursor.next < len(texts), "within the first epoch"
    expected = Counter()
    for number in documents_at(np.array(behind, dtype=np.int64), len(texts), 7).tolist():
        expected.update([ord(letter) + OFFSET for letter in texts[number]] + [EOS])
    assert Counter(taken) == expected


def test_labels_of_leftovers_travel_with_them(tmp_path, build):
    """What two ranks had tokenized and not used is where one rank goes on, as documents of their own."""
    path = write_text_files(tmp_path / "texts", [letter * 20 for letter in "abcdef"])
    ranks = ranks_of(build, path, 2, batch_size=1, packing="documents")
    for batches in ranks:
        next(batches)
    states = saved(ranks)
    pieces = [piece["tokens"] for state in states for piece in state["leftover"]]
    assert [len(piece) for piece in pieces] == [13, 13]
    (one,) = ranks_of(build, path, 1, states, batch_size=4, packing="documents")
    batch = next(one)
    assert batch["input_ids"].flatten()[:26].tolist() == pieces[0] + pieces[1]
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch["labels"][1].eq(-100).tolist() == [True, False, False, False, False, True, False, False]


def test_validation_state_is_that_of_any_number_of_ranks(tmp_path, build):
    path = write_text_files(tmp_path / "texts", ["abcdefgh" * 12])
    two = ranks_of(build, path, 2, repeat=False)
    for batches in two:
        next(batches)
    whole = tokens_of(build(path, repeat=False))
    (one,) = ranks_of(build, path, 1, saved(two), repeat=False)
    assert tokens_of(one) == whole[32:]


# --- worker processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_give_what_this_process_would(tmp_path, build, num_workers):
    path = write_text_files(tmp_path / "texts", ["x" * (number * 37 % 300) + str(number) for number in range(60)])
    here, there = (build(path, num_workers=count, data_rank=1, data_world_size=2) for count in (0, num_workers))
    for _ in range(2):  # the second time after a restart, with answers to older requests still on their way
        assert all(map(same, islice(here, 150), there))
        assert there.state_dict() == here.state_dict()
        state = here.state_dict()
        here.reset()
        there.reset()
    there.load_state_dict(of_all_ranks(state))
    here.load_state_dict(of_all_ranks(state))
    assert all(map(same, islice(here, 20), there))
    there.close()
    assert same(next(here), next(there)), "after closing it starts again where it was"
    there.close()
