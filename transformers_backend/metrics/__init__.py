"""What a run reports while it trains.

Reading order: `logger.py` (MetricsLogger: the figures of an interval, where they go), `files.py` (metrics.jsonl and its
like, resumed or begun anew), `terminal.py` (log lines and the progress bar), `trackers.py` (TensorBoard, W&B).
"""

from transformers_backend.metrics.logger import MetricsLogger, peak_memory_gib
from transformers_backend.metrics.terminal import setup_logging
from transformers_backend.metrics.trackers import Tracker, check_trackers_installed, open_trackers

__all__ = [
    "MetricsLogger",
    "Tracker",
    "check_trackers_installed",
    "open_trackers",
    "peak_memory_gib",
    "setup_logging",
]
