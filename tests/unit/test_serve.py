"""Options of `python -m gpsd_dist.serve` that cannot be meant are refused, all at once."""

import pytest

from gpsd_dist.serve.__main__ import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", "0", "--queue_tokens", "-1"), "--workers 0 must be above 0; --queue_tokens -1 must be above 0"),
        (("--sample", "2"), "--sample 2.0 must be between 0 and 1"),
        (("--drain_s", "-1"), "--drain_s must not be below 0"),
        (("--deadline_ms", "nan"), "--deadline_ms nan must be above 0"),
        (("--queue", "5"), "unrecognized arguments"),
    ],
)
def test_option_is_refused(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["artefacts/ctr", *options])
    assert ended.value.code == 2 and message in capsys.readouterr().err
