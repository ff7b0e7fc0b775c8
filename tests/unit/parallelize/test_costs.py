"""FLOPs a token and peaks against counts made by hand."""

from __future__ import annotations

import pytest
import torch

from parallelize.costs import AttentionCost, mfu, peak_flops, training_flops_per_token


def test_multi_head_attention():
    # hidden 8, 2 heads of 4, MLP of 3 x (8 x 16), vocabulary 10, 1 layer, head not tied.
    # N = q, k, v, o: 4 * 8 * 8 = 256; MLP: 3 * 8 * 16 = 384; norms: 3 * 8 = 24; head: 10 * 8 = 80; sum 744.
    # 6 N = 4464. Attention at 5 tokens: 12 * 2 heads * 4 * 5 = 480. Sum 4944.
    layer = AttentionCost(heads=2, query_key_dim=4, value_dim=4, window=None)
    assert training_flops_per_token(matmul_parameters=744, attention=[layer], seq_len=5) == 4944


def test_grouped_queries_change_parameters_but_not_scores():
    # As above with 1 key/value head: k and v shrink to 8 x 4 each, so N = 744 - 2 * 32 = 680 and 6 N = 4080.
    # Scores are still one row for each of the 2 query heads: 480. Sum 4560.
    layer = AttentionCost(heads=2, query_key_dim=4, value_dim=4, window=None)
    assert training_flops_per_token(matmul_parameters=680, attention=[layer], seq_len=5) == 4560


def test_tied_head_costs_what_an_untied_one_does():
    # hidden 8, vocabulary 10, the blocks as in the first test: 664 without head.
    # Untied the model has 664 + 80 (table) + 80 (head) parameters, of which the table does not multiply: N = 744.
    # Tied it has 664 + 80, of which all multiply: N = 744.
    untied_total, tied_total, table = 824, 744, 80
    layer = AttentionCost(heads=2, query_key_dim=4, value_dim=4, window=None)
    untied = training_flops_per_token(matmul_parameters=untied_total - table, attention=[layer], seq_len=5)
    tied = training_flops_per_token(matmul_parameters=tied_total, attention=[layer], seq_len=5)
    assert untied == tied == 4944


def test_sliding_window_caps_the_sequence():
    # No parameters, 2 heads of 4. A window of 3 at 5 tokens: 12 * 2 * 4 * 3 = 288; a full layer: 480; a window of 9
    # is no limit at 5 tokens: 480. Sum 1248.
    def layer(window):
        return AttentionCost(heads=2, query_key_dim=4, value_dim=4, window=window)

    layers = [layer(3), layer(None), layer(9)]
    assert training_flops_per_token(matmul_parameters=0, attention=layers, seq_len=5) == 288 + 480 + 480


def test_value_heads_of_another_size():
    # Latent attention, 2 heads with queries of 6 and values of 4, at 5 tokens. Forward a token: scores 2 * 2 * 6 * 5
    # = 120, weighted sum 2 * 2 * 4 * 5 = 80; backward is twice that: 3 * 200 = 600.
    layer = AttentionCost(heads=2, query_key_dim=6, value_dim=4, window=None)
    assert training_flops_per_token(matmul_parameters=0, attention=[layer], seq_len=5) == 600


def test_no_attention_is_six_operations_a_parameter():
    assert training_flops_per_token(matmul_parameters=7, attention=[], seq_len=5) == 42


def test_llama_3_1_8b():
    # 8,030,261,248 parameters, of which the embedding table has 128,256 * 4,096 = 525,336,576: N = 7,504,924,672.
    # 6 N = 45,029,548,032. 32 layers * 12 * 32 heads * 128 * 8,192 tokens = 12,884,901,888. Sum 57,914,449,920.
    attention = [AttentionCost(heads=32, query_key_dim=128, value_dim=128, window=None)] * 32
    flops = training_flops_per_token(matmul_parameters=8_030_261_248 - 525_336_576, attention=attention, seq_len=8192)
    assert flops == 57_914_449_920
    # torchtitan reports 6,667 tokens/s and 39 % for it on an H100 with torch.compile.
    assert mfu(6667, flops, peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16)) == pytest.approx(0.39, abs=0.005)


@pytest.mark.parametrize(
    ("device_name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_peaks_of_known_devices(device_name, tera):
    assert peak_flops(device_name, torch.bfloat16) == tera * 1e12
    assert peak_flops(device_name, torch.float16) == tera * 1e12


@pytest.mark.parametrize(
    "device_name",
    [
        "cpu",
        "",
        "Tesla V100-SXM2-16GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)
def test_unknown_peaks_are_none(device_name):
    assert peak_flops(device_name, torch.bfloat16) is None


def test_float32_has_no_single_peak():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None


def test_mfu():
    # 100 tokens/s of 2e9 operations are 2e11 FLOP/s: a fifth of a peak of 1e12.
    assert mfu(100.0, 2e9, 1e12) == pytest.approx(0.2)
    assert mfu(100.0, 2e9, None) is None
