"""Names of `ModelConfig.name`: towers map token vectors [S, D] and Packing to hidden states [S, D] (or [C, D])."""

from gpsd_dist.model.transformer import Transformer

TOWERS = {"transformer": Transformer}
