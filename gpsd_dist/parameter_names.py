"""Names the tensors of a model and of checkpoints: `table.<name>`, `dense.<parameter>`, `ids.<table>.<name>`.

Names are an interface: checkpoints, full transfer (`dense.backbone.*`) and optimizer state are found by them.
"""

from torch import nn


def module_key(name: str) -> str:
    """Key of a feature, table or task in a module dict; `type` and the like are attributes there, dots separate."""
    key = name.replace(".", "_")
    is_taken = any(hasattr(cls(), key) for cls in (nn.ModuleDict, nn.ParameterDict))
    return f"{key}_" if is_taken else key
