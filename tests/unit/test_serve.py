"""Options of `python -m gpsd_dist.serve` that cannot be meant are refused, all at once."""

import asyncio

import pytest
import uvicorn

from gpsd_dist.serve.__main__ import _bound, main
from gpsd_dist.serving import request_files
from gpsd_dist.serving.service import _Server


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


def test_of_two_servers_that_bind_at_once_the_later_one_names_the_port():
    with _bound("127.0.0.1", 0) as first, _bound("127.0.0.1", first.getsockname()[1]) as second:
        first.listen()
        server = _Server(uvicorn.Config(lambda scope: None, lifespan="off", log_config=None))
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        with pytest.raises(OSError, match=rf"port {first.getsockname()[1]} .*choose another --port"):
            asyncio.run(server.startup([second]))


def test_requests_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing does not exist; name a Parquet file"):
        next(iter(request_files.read(None, tmp_path / "nothing")))
