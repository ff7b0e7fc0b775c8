"""What scripts/benchmark.py and scripts/benchmark_kernels.py are made of.

presets.py            models and batches
contenders.py         ways to train a model: the gate that starts and stops them, and this project's trainer
peers.py              the others: Transformers' Trainer, bare loops, torchtitan's Llama
rounds.py             a process for each, and their turns
report.py, chart.py   what was measured becomes ratios, tables and a picture
machine.py            what the machine is, and the most that it can do
kernel_cases.py       each kernel beside what computes the same, and what that has to read and compute
context.py            attention blocks beside one call, and a ring on one device
timing.py             seconds and memory of one forward and backward
"""
