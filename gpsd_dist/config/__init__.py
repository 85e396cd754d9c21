"""Holds every option of a run as frozen dataclasses with their checks; neither gin nor torch is imported here.

`gin_cli.py` alone knows gin, and builds one `RunConfig` from files and command line; library code receives its parts as
arguments. Sizes of tables are not options: they come from the data set's manifest.
"""

from gpsd_dist.config.execution import ExecutionConfig as ExecutionConfig
from gpsd_dist.config.ids import IdsConfig as IdsConfig
from gpsd_dist.config.model import ModelConfig as ModelConfig
from gpsd_dist.config.run import GIN_CLASSES as GIN_CLASSES
from gpsd_dist.config.run import STRATEGIES as STRATEGIES
from gpsd_dist.config.run import RunConfig as RunConfig
from gpsd_dist.config.run import run_config_from_dict as run_config_from_dict
from gpsd_dist.config.tables import SHARDING_TYPES as SHARDING_TYPES
from gpsd_dist.config.tables import TablesConfig as TablesConfig
from gpsd_dist.config.training import CUDA_ONLY_SPARSE_OPTIMIZERS as CUDA_ONLY_SPARSE_OPTIMIZERS
from gpsd_dist.config.training import NEGATIVES_PER as NEGATIVES_PER
from gpsd_dist.config.training import SPARSE_OPTIMIZERS as SPARSE_OPTIMIZERS
from gpsd_dist.config.training import DataConfig as DataConfig
from gpsd_dist.config.training import FinetuneConfig as FinetuneConfig
from gpsd_dist.config.training import OptimizerConfig as OptimizerConfig
from gpsd_dist.config.training import PretrainConfig as PretrainConfig
from gpsd_dist.config.training import TrainConfig as TrainConfig
