"""The job config: what a TOML file and a command line can say, checked before anything else happens.

Reading order: `sections.py`, `data_sections.py` and `run_sections.py` (every key with its meaning and rules),
`config.py` (JobConfig, rules that span sections), `load.py` (TOML and command line to JobConfig). `rules.py`,
`values.py`, `help.py` and `torchtitan.py` serve them.
"""

from transformers_backend.job_config.config import JobConfig, validate
from transformers_backend.job_config.data_sections import Source, Stage, TextSource, stage_weights
from transformers_backend.job_config.load import load_job_config, read_model_sections
from transformers_backend.job_config.run_sections import Comm, Debug, Metrics, Profiling
from transformers_backend.job_config.sections import (
    CHECKPOINT_PARTS,
    Checkpoint,
    HFTransformers,
    Job,
    LRScheduler,
    Model,
    Optimizer,
    Training,
    Validation,
)

__all__ = [
    "CHECKPOINT_PARTS",
    "Checkpoint",
    "Comm",
    "Debug",
    "HFTransformers",
    "Job",
    "JobConfig",
    "LRScheduler",
    "Metrics",
    "Model",
    "Optimizer",
    "Profiling",
    "Source",
    "Stage",
    "TextSource",
    "Training",
    "Validation",
    "load_job_config",
    "read_model_sections",
    "stage_weights",
    "validate",
]
