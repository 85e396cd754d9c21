"""Says which laws a tower cannot express, whatever it learns, so that a low share there is no fault of training."""

_NO_ORDER = {
    "din": "DIN's attention is a sum over a set: no token knows its place",
    "deepfm": "DeepFM reads the mean of the history: no token has a place",
    "dmin": "DMIN has no positions: a token sees those before it, but not that none comes after it",
}
_NO_COUNT = {
    "din": "DIN's attention is a softmax over the history: it sees shares of the events, not their number",
    "deepfm": "DeepFM reads the mean of the history: it sees shares of the events, not their number",
}
UNSEEN: dict[str, dict[str, str]] = {"order": _NO_ORDER, "recency": _NO_ORDER, "count": _NO_COUNT}
"""Law -> `ModelConfig.name` -> why. Not in it: every other pair can be expressed."""


def unseen(law: str, model: str, matches: bool = False) -> str:
    """Returns why a model cannot express a law in full, or an empty string.

    `matches`: whether its heads get `ModelConfig.matches`: how many events are like the candidate, and how old.
    """
    return "" if matches and law in ("recency", "count") else UNSEEN.get(law, {}).get(model, "")
