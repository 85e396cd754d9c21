"""Lets MLPerf's LoadGen ask a scorer, in this process or over HTTP, and prints LoadGen's own summary.

Server: requests arrive by a Poisson process, valid if the 99th percentile of latency is within the target. Offline: all
samples at once, throughput counts. https://github.com/mlcommons/inference/tree/master/loadgen
"""

import asyncio
import pathlib
import tempfile
import threading
import time
import typing

import mlperf_loadgen as loadgen

from benchmarks.open_loop import Client
from gpsd_dist.serving.messages import ScoreBody, decode_body
from gpsd_dist.serving.queue import TokenQueue, Waiting
from gpsd_dist.serving.scoring_thread import ScoringThread
