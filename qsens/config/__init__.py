"""Everything a user can set: frozen pydantic models, and how they are read from files.

Reading configuration never imports torch.
"""

from qsens.config.dag import DagConfig
from qsens.config.load import Loaded, choices, load_sweep
from qsens.config.models import (
    AutoquantConfig,
    DatasetConfig,
    ModelConfig,
    RunnerConfig,
    SweepConfig,
)
from qsens.config.pairs import GranularityConfig, PairConfig
from qsens.config.roots import Roots

__all__ = [
    "AutoquantConfig",
    "DagConfig",
    "DatasetConfig",
    "GranularityConfig",
    "Loaded",
    "ModelConfig",
    "PairConfig",
    "Roots",
    "RunnerConfig",
    "SweepConfig",
    "choices",
    "load_sweep",
]
