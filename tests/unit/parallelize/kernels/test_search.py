"""The search for the fastest candidate, on a GPU that is made up; and whether every candidate computes right."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from parallelize.context_parallel.blocks import ReferenceBlocks
from parallelize.context_parallel.kernels import TritonBlocks
from parallelize.context_parallel.layout import Chunk
from parallelize.context_parallel.masks import BlockMask, MaskRule
from parallelize.kernels import attention_block, attention_block_tiles, linear_cross_entropy_kernels, search
from parallelize.kernels import linear_cross_entropy as linear_cross_entropy_operator
from parallelize.kernels import linear_cross_entropy_tiles as product_tiles
from parallelize.kernels.attention_block_tiles import SMALLEST, Tiles
from parallelize.kernels.language import OutOfResources
from parallelize.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from parallelize.kernels.linear_cross_entropy_tiles import Tile
from parallelize.kernels.search import Gpu, Search, bucket
from tests.full_attention import error
from tests.kernel_bars import needs_triton

DEVICE = torch.device("cuda", 0)
CANDIDATES = [(128, 8), (64, 8), (32, 4)]
MUCH = 2**40  # products: enough to search


class MadeUp(Gpu):
    """A GPU on which launches take what `milliseconds_of` says, and candidates without a number do not fit."""

    def __init__(self, *milliseconds: float | None, name: str = "made up") -> None:
        self.milliseconds_of = dict(zip(CANDIDATES, milliseconds, strict=False))
        self.tried: list[tuple] = []
        self.has_freedom, self.captures, self._name = True, False, name

    def is_free(self, device: torch.device) -> bool:
        return self.has_freedom

    def is_capturing(self) -> bool:
        return self.captures

    def name(self, device: torch.device) -> str:
        return self._name

    def wait(self, device: torch.device) -> None:
        pass

    def milliseconds(self, run: Callable[[], tuple]) -> float:
        self.tried.append(run())
        return self.milliseconds_of[self.tried[-1]]

    def prepare(self, candidate: tuple) -> Callable[[], tuple]:
        def run() -> tuple:
            if self.milliseconds_of.get(candidate, 0.0) is None:
                raise OutOfResources(300, 200, "shared memory")
            return candidate

        return run

    def launch(self, file: Path | Search, details: tuple = (1,), products: int = MUCH, **options) -> tuple:
        """Which candidate a launch ends up with."""
        one = Search(file, self) if isinstance(file, Path) else file
        return one.launch("kernel", DEVICE, details, CANDIDATES, self.prepare, products=products, **options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "found.json"


def test_the_fastest_is_launched_and_remembered(file: Path):
    gpu = MadeUp(3.0, 1.0, 2.0)
    one = Search(file, gpu)
    assert [gpu.launch(one) for _ in range(3)] == [(64, 8)] * 3
    assert gpu.tried == CANDIDATES
    gpu.milliseconds_of = dict(zip(CANDIDATES, (3.0, 2.0, 1.0), strict=True))
    assert gpu.launch(one, details=(2,)) == (32, 4)  # another key, another search
    assert gpu.launch(one) == (64, 8)


def test_a_second_process_does_not_search(file: Path):
    MadeUp(3.0, 1.0, None).launch(file)
    second = MadeUp(3.0, 5.0, None)
    assert second.launch(file) == (64, 8)
    assert second.tried == []
    assert MadeUp(3.0, 5.0, 6.0, name="another").launch(file) == (128, 8)
    assert len(json.loads(file.read_text())) == 2
    assert {path.name for path in file.parent.iterdir()} == {"found.json", "found.lock"}


def test_candidates_without_room_are_skipped(file: Path):
    gpu = MadeUp(None, 2.0, 1.0)
    assert gpu.launch(file) == (32, 4)
    assert gpu.tried == CANDIDATES[1:]
    for has_freedom in (True, False):
        gpu = MadeUp(None, None, None)
        gpu.has_freedom = has_freedom
        assert gpu.launch(file, spare=[(16, 4)]) == (16, 4)
        with pytest.raises(OutOfResources):
            gpu.launch(file)


def test_a_candidate_that_does_not_compile_is_left_out_unless_it_is_the_first(file: Path, monkeypatch):
    def fails_for(bad: tuple):
        def milliseconds(gpu: MadeUp, run) -> float:
            if run() == bad:
                raise RuntimeError("PassManager::run failed")
            return 1.0

        return milliseconds

    monkeypatch.setattr(MadeUp, "milliseconds", fails_for(CANDIDATES[1]))
    assert MadeUp(1.0, 1.0, 1.0).launch(file) == CANDIDATES[0]
    monkeypatch.setattr(MadeUp, "milliseconds", fails_for(CANDIDATES[0]))
    with pytest.raises(RuntimeError, match="PassManager"):
        MadeUp(1.0, 1.0, 1.0, name="another").launch(file)


def test_what_fits_one_size_may_not_fit_another_of_its_key(file: Path):
    gpu = MadeUp(2.0, 1.0, 3.0)
    one = Search(file, gpu)
    gpu.launch(one)
    gpu.milliseconds_of[64, 8] = None
    assert gpu.launch(one) == (128, 8)


def test_the_first_wins_ties(file: Path):
    assert MadeUp(1.01, 1.0, 1.0).launch(file) == (128, 8)
    assert MadeUp(None, 1.01, 1.0, name="another").launch(file) == (64, 8)


def test_nothing_is_searched_where_results_must_not_depend_on_it(file: Path):
    gpu = MadeUp(3.0, 1.0, 2.0)
    one = Search(file, gpu)
    assert gpu.launch(one) == (64, 8)
    gpu.has_freedom = False
    assert gpu.launch(one) == (128, 8)
    assert gpu.launch(one, details=(2,)) == (128, 8)
    assert gpu.tried == CANDIDATES


def test_a_gpu_is_free_but_for_deterministic_algorithms():
    assert Gpu().is_free(DEVICE)
    assert not Gpu().is_free(torch.device("cpu"))
    torch.use_deterministic_algorithms(True)
    try:
        assert not Gpu().is_free(DEVICE)
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_is_searched_while_a_graph_is_captured(file: Path):
    gpu = MadeUp(3.0, 1.0, 2.0)
    one = Search(file, gpu)
    gpu.captures = True
    assert gpu.launch(one) == (128, 8)
    assert gpu.tried == []
    gpu.captures = False
    assert gpu.launch(one) == (64, 8)
    gpu.captures = True
    assert gpu.launch(one) == (64, 8)  # found before


def test_small_work_is_not_searched(file: Path):
    gpu = MadeUp(3.0, 1.0, 2.0)
    one = Search(file, gpu)
    assert gpu.launch(one, products=1000) == (128, 8)
    assert gpu.launch(one) == (64, 8)  # of the same key, but large
    assert gpu.launch(one, products=1000) == (128, 8)


def test_lengths_share_a_bucket():
    assert {bucket(tokens) for tokens in range(4097, 8193)} == {13}
    assert [bucket(number) for number in (1, 2, 3, 4096)] == [0, 1, 2, 12]


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "3", '{"NAME": 3}', '{"NAME": [[[128, 8]]]}',
    '{"NAME": [[[128, 8], "fast"], [[64, 8], 2.0], [[32, 4], 3.0]]}', '{"NAME": [[[128, 8], 1.0], [[64, 8], 2.0]]}',
    '{"NAME": [[[128, 8], 1.0], [[64, 8], 2.0], [[16, 4], 3.0]]}', '{"NAME": [[[[128], 8], 1.0]]}',
])  # fmt: skip
def test_a_damaged_or_foreign_file_is_ignored(file: Path, text: str):
    MadeUp(3.0, 1.0, 2.0).launch(file)
    [name] = json.loads(file.read_text())
    file.write_text(text.replace('"NAME"', json.dumps(name)))
    gpu = MadeUp(3.0, 2.0, 1.0)
    assert gpu.launch(file) == (32, 4)
    assert gpu.tried == CANDIDATES
    assert MadeUp(1.0, 1.0, 1.0).launch(file) == (32, 4)  # mended


def test_without_a_folder_every_process_searches(tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    gpu = MadeUp(3.0, 1.0, 2.0)
    one = Search(tmp_path / "cache" / "found.json", gpu)
    assert [gpu.launch(one), gpu.launch(one)] == [(64, 8)] * 2
    assert gpu.tried == CANDIDATES


@contextlib.contextmanager
def another_process_searches(file: Path, found: Path, *, seconds: float) -> Iterator[None]:
    """It holds the lock for a while, and what it finds, if anything, is in `found`."""
    program = (
        "import fcntl, os, sys, time; lock = open(sys.argv[1], 'a'); fcntl.lockf(lock, fcntl.LOCK_EX); "
        "print(flush=True); time.sleep(float(sys.argv[4])); "
        "os.path.exists(sys.argv[3]) and os.replace(*sys.argv[3:1:-1])"
    )
    file.parent.mkdir(exist_ok=True)
    arguments = (file.with_suffix(".lock"), file, found, str(seconds))
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield
        process.kill()


def test_a_rank_waits_for_the_search_of_another(file: Path, tmp_path: Path):
    MadeUp(3.0, 1.0, 2.0).launch(file)
    file.replace(tmp_path / "found")
    gpu = MadeUp(1.0, 2.0, 3.0)
    with another_process_searches(file, tmp_path / "found", seconds=0.5):
        assert gpu.launch(file) == (64, 8)
    assert gpu.tried == []


def test_a_rank_does_not_wait_for_ever(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "_PATIENCE", 0.2)
    gpu = MadeUp(1.0, 2.0, 3.0)
    with another_process_searches(file, tmp_path / "nothing", seconds=60):
        assert gpu.launch(file) == (128, 8)
    assert gpu.tried == CANDIDATES


# -- kernels ------------------------------------------------------------------------------------------------------


class Tried(MadeUp):
    """Launches for real, in the interpreter, and finds what comes last the fastest."""

    def milliseconds(self, run: Callable[[], object]) -> float:
        run()
        self.tried.append(run())
        return 1 / len(self.tried)


@pytest.fixture
def tried(file: Path, monkeypatch: pytest.MonkeyPatch) -> Tried:
    """Kernels search on the CPU."""
    gpu = Tried()
    monkeypatch.setattr(search, "_LEAST_PRODUCTS", 0)
    for module in (attention_block, linear_cross_entropy_kernels):
        monkeypatch.setattr(module, "SEARCH", Search(file, gpu))
    return gpu


def attend(blocks, length: int = 150, rule: MaskRule = MaskRule(window=140), documents=None) -> list[torch.Tensor]:  # noqa: B008
    """Output, log-sum-exp and gradients of one block with all tokens."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_out = (
        torch.randn(1, heads, length, 16, generator=generator) for heads in (2, 1, 1, 2)
    )  # fmt: skip
    mask = BlockMask(rule, Chunk(0, length), Chunk(0, length), documents, documents)
    out, log_sum = blocks.forward(query, key, value, mask, scale=0.3)
    return [out, log_sum, *blocks.backward(grad_out, query, key, value, out, log_sum, mask, scale=0.3)]


_TABLES = ("_FORWARD_TILES", "_GRAD_QUERY_TILES", "_GRAD_KEY_TILES")
_ALL_TILES = {tiles[:2]: tiles for name in _TABLES for listed in getattr(attention_block_tiles, name).values()
              for tiles in (*listed, *SMALLEST)}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("tiles", _ALL_TILES.values(), ids=str)
def test_every_candidate_for_attention_is_right(tiles: Tiles):
    for found, expected in zip(attend(TritonBlocks(tiles)), attend(ReferenceBlocks()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_triton
def test_attention_searches(tried: Tried, monkeypatch: pytest.MonkeyPatch):
    candidates = [Tiles(16, 16), Tiles(32, 16), Tiles(16, 32)]
    for name in ("forward_tiles", "grad_query_tiles", "grad_key_tiles"):
        monkeypatch.setattr(attention_block, name, lambda query, value: candidates)
    documents = (torch.arange(60) // 25)[None]
    expected = attend(ReferenceBlocks(), 60, documents=documents)
    for _ in range(2):
        for found, right in zip(attend(TritonBlocks(), 60, documents=documents), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    attend(TritonBlocks(), 59, documents=documents[:, :59])  # another length, another choice of nothing
    assert len(tried.tried) == 3 * len(candidates)


@pytest.mark.parametrize("tables", _TABLES)
def test_there_are_few_candidates_for_attention(tables: str):
    for listed in getattr(attention_block_tiles, tables).values():
        assert len(set(listed)) == len(listed) <= 6


def compare_losses(dtype: torch.dtype = torch.float32) -> None:
    """The kernels' loss and gradients with those of plain torch, and with what the tiles do not divide."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 70, generator=generator).to(dtype) for rows in (140, 300))
    targets = torch.randint(300, (140,), generator=generator)
    targets[::5] = -100
    results = []
    # In half precision the gradient of logits is rounded between two products.
    bar = 1e-5 if dtype == torch.float32 else 2e-3
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        loss = function(*leaves, targets, scale=0.2, softcap=4.0)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for found, right in zip(*results, strict=True):
        assert error(found, right.double()) < bar


_ALL_PRODUCT_TILES = {
    tile[:3]: tile for listed in (*product_tiles._TILES.values(), product_tiles.SMALLEST) for tile in listed
}


@needs_triton
@pytest.mark.parametrize(
    "tile", [*_ALL_PRODUCT_TILES.values(), *product_tiles.SMALLEST], ids=lambda tile: str(tile[:3])
)
def test_every_candidate_for_linear_cross_entropy_is_right(tile: Tile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(product_tiles, "_TILES", {4: [tile]})
    compare_losses()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear_cross_entropy_searches(dtype: torch.dtype, tried: Tried, monkeypatch: pytest.MonkeyPatch):
    """Its kernels run several times, one of which adds to what is there; and the vocabulary comes in slices."""
    candidates = [Tile(32, 64, 32), Tile(64, 32, 32), Tile(32, 32, 64)]
    monkeypatch.setattr(product_tiles, "_TILES", {2: candidates, 4: candidates})
    monkeypatch.setitem(linear_cross_entropy_operator._SLICE_ELEMENTS, "cpu", 140 * 128)
    for _ in range(2):
        compare_losses(dtype)
    assert len(tried.tried) == 4 * len(candidates)


def test_there_are_few_candidates_for_linear_cross_entropy():
    for listed in product_tiles._TILES.values():
        assert len(set(listed)) == len(listed) <= 6
