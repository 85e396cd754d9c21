"""Names of `ModelConfig.name`: towers map (token vectors [S, D], Packing) to hidden states [S, D]."""

from gpsd_dist.model.transformer import Transformer

TOWERS = {"transformer": Transformer}
