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
        (("--max_body_mib", "inf"), "--max_body_mib inf must be finite"),
        (("--port", "99999"), "--port 99999 must be between 0 and 65535"),
        (("--queue", "5"), "unrecognized arguments"),
    ],
)
def test_option_is_refused(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["artefacts/ctr", *options])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_host_that_nobody_knows_is_named(capsys):
    assert main(["artefacts/ctr", "--host", "a..b", "--port", "0"]) == 2
    assert "--host a..b is no address" in capsys.readouterr().err
