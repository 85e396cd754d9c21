"""GPSD: generative pretraining, sparse transfer and freezing for click models (arXiv:2506.03699), on TorchRec."""

__version__ = "0.2.0"
