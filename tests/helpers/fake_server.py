"""A server with `FakeScorer` in place of the module that imports torch, which takes 5 s of CPU: a program for tests."""

import sys
import types

sys.modules["gpsd_dist.serving.scorer"] = stub = types.SimpleNamespace(Scorer=None, load=None)

from gpsd_dist.serve.__main__ import main  # noqa: E402
from tests.helpers.fake_scorer import FakeScorer  # noqa: E402

stub.load = FakeScorer

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
