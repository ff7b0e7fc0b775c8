"""Train any dense Transformers causal LM, unmodified, on a torch-native mesh. The public API, by name."""

from parallelize.config import ActivationCheckpointConfig, CompileConfig, KernelConfig, ParallelismConfig
from transformers_backend.data import register_dataset
from transformers_backend.job_config import HFTransformers, JobConfig, load_job_config
from transformers_backend.model import HFTransformerModel, HFTransformerModelArgs
from transformers_backend.trainer import Trainer

__all__ = [
    "ActivationCheckpointConfig",
    "CompileConfig",
    "HFTransformerModel",
    "HFTransformerModelArgs",
    "HFTransformers",
    "JobConfig",
    "KernelConfig",
    "ParallelismConfig",
    "Trainer",
    "load_job_config",
    "register_dataset",
]
