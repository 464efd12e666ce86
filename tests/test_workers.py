"""Builds by the workers of a Ray cluster: the same library as by one process, whatever happens to a worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from laws_ros import __version__
from laws_ros.build import workers, workloads
from laws_ros.build.evaluate import policy_rollouts
from laws_ros.build.grow import grow
from laws_ros.cli import main
from laws_ros.core.errors import ConfigError
from laws_ros.runtime.policy import Policy
from tests.support import random_mlp, save_mlp


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    options = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "object_store_memory": 1 << 27}
    ray.init("local", **options)  # whatever else runs on this machine
    with workers.hired("ray") as found:
        yield found
    assert ray.is_initialized()  # who did not start a cluster does not end it
    ray.shutdown()


class Mortal:
    """Workers of whom one is killed in the middle of its work, once for each mark."""

    def __init__(self, workers, folder: Path, deaths: int) -> None:
        self.workers, self.count, self.folder, self.deaths = workers, workers.count, folder, deaths
        self.wrapped = {}

    def map(self, work, items):
        folder, deaths = str(self.folder), self.deaths

        def mortal(item):  # pickled by value, as it is local
            for k in range(deaths):
                try:
                    os.close(os.open(f"{folder}/{k}", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
            return work(item)

        return self.workers.map(self.wrapped.setdefault(id(work), mortal), items)

    def together(self, jobs):
        return self.workers.together(jobs)


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_build_is_the_same_though_workers_are_killed(built, cluster, tmp_path) -> None:
    x = built.observations[:1500]
    arguments = built.policy, built.network, x, built.policy.batch(x), np.full(2, 0.1)
    here = grow(*arguments, max_regions=100)
    mortal = Mortal(cluster, tmp_path, 3)
    there = grow(*arguments, max_regions=100, workers=mortal)
    assert len(list(tmp_path.iterdir())) == 3  # so many died
    assert there.library.digest == here.library.digest and there.certificates_tried == here.certificates_tried


def test_episodes_are_the_same_and_resumed(cluster, tmp_path) -> None:
    policy = Policy(save_mlp(tmp_path / "p.onnx", random_mlp(np.random.default_rng(3), [4, 16, 1]), "Tanh", clip=5.0))
    workload = workloads.get("cartpole")
    here = policy_rollouts(policy, workload, 5, 7)
    (tmp_path / "deaths").mkdir()
    there = policy_rollouts(
        policy, workload, 5, 7, parts=tmp_path / "parts", workers=Mortal(cluster, tmp_path / "deaths", 2)
    )
    kept = list((tmp_path / "parts").glob("*.npz"))
    assert len(kept) == 2  # parts, for two workers
    kept[0].unlink()  # as if everything had been lost before it was done
    again = policy_rollouts(policy, workload, 5, 7, parts=tmp_path / "parts", workers=cluster)
    for column in range(3):
        assert same(here[column], there[column]) and same(here[column], again[column])


def test_what_work_raises_arrives_as_it_was(cluster) -> None:
    def refuse(item):
        raise ConfigError(f"item {item}: no")

    with pytest.raises(ConfigError, match=r"^item 1: no$"):
        list(cluster.map(refuse, [1, 2]))


def test_answers_come_in_order_and_items_are_taken_late(cluster) -> None:
    taken = []

    def items():
        for k in range(20):
            taken.append(k)
            yield k

    def slow(item):
        import time

        time.sleep(0.05 * (item % 3))
        return item

    answers = cluster.map(slow, items())
    assert next(answers) == 0 and len(taken) <= workers.AHEAD * cluster.count
    assert list(answers) == list(range(1, 20))


def test_jobs_go_on_side_by_side_and_answer_in_order(cluster) -> None:
    both = threading.Barrier(2, timeout=100.0)

    def job(first: int) -> list[int]:
        found = list(cluster.map(abs, [first, first - 1]))
        both.wait()  # the other one is at work, too
        return found + list(cluster.map(abs, [first]))

    jobs = [partial(job, -3), partial(job, -7)]
    assert cluster.together(jobs) == [[3, 4, 3], [7, 8, 7]]
    assert cluster.together([]) == [] and workers.HERE.together([partial(abs, -1), partial(abs, -2)]) == [1, 2]


def test_a_cluster_that_is_gone_is_not_waited_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert workers._address() is None  # Ray starts one
    left = tmp_path / "ray" / "ray_current_cluster"
    left.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"127.0.0.1:{server.getsockname()[1]}"
        left.write_text(here)
        assert workers._address() is None  # Ray finds it
        monkeypatch.setenv("RAY_ADDRESS", f"ray://{here}")
        assert workers._address() is None
    with pytest.raises(ConfigError, match=rf"^Ray cluster \(ray://{here}\): does not answer"):
        workers._address()
    monkeypatch.delenv("RAY_ADDRESS")
    assert workers._address() == "local"  # it was killed, and its address is still there


def test_a_worker_with_another_version_refuses() -> None:
    with pytest.raises(ConfigError, match=f"a worker of the cluster has laws_ros {__version__}, this is 0.0.1"):
        workers._work("0.0.1", [], None)


def test_without_ray_there_is_one_clear_line(built, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["build", "--policy", str(built.path), "--workload", "cartpole", "--out", str(tmp_path / "l.laws")]
    assert main([*arguments, "--engine", "ray"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'laws_ros[cluster]'" in err


def test_a_local_build_imports_nothing_of_ray() -> None:
    code = """
import sys
sys.modules["ray"] = None
import laws_ros.build.evaluate, laws_ros.build.grow, laws_ros.build.statistical
from laws_ros.build.workers import hired
with hired("local") as workers:
    assert list(workers.map(str, range(3))) == ["0", "1", "2"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
