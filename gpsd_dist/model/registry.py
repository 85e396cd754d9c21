"""Names of `ModelConfig.name`: towers map (token vectors [S, D], Packing, candidates_only) to hidden states [S or C, D]."""

from gpsd_dist.model.transformer import Transformer

TOWERS = {"transformer": Transformer}
