"""Names what both ways of predicting write. Needs neither torch nor TorchRec."""

import pyarrow as pa

SUMMARY_NAME = "predictions.json"


def number_fields(task: str, is_conditional: bool) -> list[pa.Field]:
    """Lists the columns of a task: logit, probability, and the product of a conditional one."""
    numbers = ("logit", "probability", "product") if is_conditional else ("logit", "probability")
    return [pa.field(f"{task}.{number}", pa.float32()) for number in numbers]
