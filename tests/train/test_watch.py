"""Steps to trace, by name; and the clock of idle devices."""

import time
from contextlib import closing

import jax
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.train.watch import Watch, parse_steps


def test_steps_by_name():
    assert list(parse_steps("20:22")) == [20, 21, 22]
    assert list(parse_steps("0:0")) == [0] and not parse_steps("")
    for text in ("20", "24:20", "a:b", "1:", ":", "-1:3", "1:2:3", " 1:2"):
        with pytest.raises(UserError, match="config.run.profile got .* expected first:last"):
            parse_steps(text)


def test_each_process_has_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with closing(Watch(range(0), tmp_path, range(9), print)) as watch:
        assert watch.folder == tmp_path / "process_1"


class Busy:
    def __init__(self, secs: float):
        self.secs = secs

    def block_until_ready(self):
        time.sleep(self.secs)
        return self


def test_idle_time_runs_from_the_end_of_a_step(tmp_path):
    idle = Watch(range(0), tmp_path, range(9), print)
    began = time.perf_counter()
    time.sleep(0.05)
    assert 0.05 <= idle.idle_secs(began) <= time.perf_counter() - began  # no step yet
    began = time.perf_counter()
    idle.dispatched(0, (1,), Busy(0.2))
    assert idle.idle_secs(began) == 0
    time.sleep(0.4)
    waited, elapsed = idle.idle_secs(began), time.perf_counter() - began
    assert 0.1 < waited <= elapsed - 0.2
    since = time.perf_counter()
    time.sleep(0.05)
    assert 0.05 <= idle.idle_secs(since) < waited  # not what lay before the batch was asked for
    idle.close()
