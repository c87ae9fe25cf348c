"""`docs/sites/kubernetes.yaml`, container by container: there is no Kubernetes here."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import contextmanager

import pytest

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.keys import SiteKeys, SyncerKeys, read_admitted
from tests.sites.cluster import Cluster
from tests.sites.kit import code, joins, leaves, make_keys, merges_after_last, site
from tests.tape_checker import check_run


@contextmanager
def cluster(folder):
    with site(folder) as here:
        make_keys(here.folder)
        made = Cluster(here)
        for line in code("kubectl").splitlines():
            made.kubectl(line)
        yield here, made


def test_keys_are_refused_as_they_are_mounted_and_taken_as_the_init_container_leaves_them(tmp_path):
    with cluster(tmp_path / "site") as (here, made):
        for job, kind, name in (("diloco-syncer", SyncerKeys, "syncer"), ("diloco-learner", SiteKeys, "site")):
            pod = made.pod(job)
            mounted = pod.volumes["secret"]
            with pytest.raises(ConfigurationError, match="lets others of this machine write to it"):
                kind.read(mounted)
            mounted.chmod(0o755)
            with pytest.raises(ConfigurationError, match=r"mode 0440 opens the secret to others"):
                kind.read(mounted)
            (init,) = pod.spec["initContainers"]
            assert here.exit_code(pod.start(init)) == 0, here.text()
            assert kind.read(pod.volumes["keys"] / name).public == kind.read(here.folder / f"{name}-keys").public
        admitted = read_admitted(made.folder / "diloco-syncer-1" / "keys" / "syncer" / "admitted")
        assert admitted == {SiteKeys.read(here.folder / "site-keys").public: "here"}


def test_the_numbers_of_the_file_fit_each_other_and_the_defaults(tmp_path):
    with cluster(tmp_path / "site") as (_, made):
        learners, syncer = (made.documents["Job", name]["spec"] for name in ("diloco-learner", "diloco-syncer"))
        (container,) = learners["template"]["spec"]["containers"]
        command = container["command"][-1]
        assert command.split()[-1] == str(learners["completions"]) == str(learners["parallelism"])
        assert made.service_endpoint() in command
        assert learners["template"]["spec"]["terminationGracePeriodSeconds"] > 2 * SyncConfig().drain_timeout_s
        for job in (learners, syncer):
            pod = job["template"]["spec"]
            # What the API demands of a limit per index, and of secrets that a user other than root reads.
            assert pod["restartPolicy"] == "Never" and job["podReplacementPolicy"] == "Failed"
            assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"]
            for each in (*pod["initContainers"], *pod["containers"]):
                assert {m["name"] for m in each["volumeMounts"]} <= {v["name"] for v in pod["volumes"]}
                assert re.search("[;&]|exec", each["command"][-1]), "the shell gets one command line"


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(420)
def test_pods_come_and_go_and_the_job_goes_on(tmp_path):
    with cluster(tmp_path / "site") as (here, made):
        run_dir = made.folder / "diloco-job" / "run"
        syncer = made.pod("diloco-syncer").run()
        here.wait_until((run_dir / "syncer.json").exists, "the syncer")
        learners = [made.pod("diloco-learner", JOB_COMPLETION_INDEX=str(i)).run() for i in range(2)]
        here.wait_until(lambda: len(joins(run_dir)) == 2 and merges_after_last("join", run_dir) > 5, "two learners")

        learners[1].send_signal(signal.SIGTERM)
        assert here.exit_code(learners[1]) == 128 + signal.SIGTERM, here.text()
        assert leaves(run_dir) == [(1, "signal")]
        learners[1] = made.pod("diloco-learner", JOB_COMPLETION_INDEX="1").run()
        here.wait_until(lambda: (1, 1) in joins(run_dir) and merges_after_last("join", run_dir) > 5, "the next pod of learner 1")

        syncer.send_signal(signal.SIGTERM)
        time.sleep(made.documents["Job", "diloco-syncer"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"])
        assert syncer.poll() is None, "the shell keeps SIGTERM from the syncer"
        os.killpg(syncer.pid, signal.SIGKILL)
        syncer = made.pod("diloco-syncer").run()
        here.wait_until(lambda: merges_after_last("restart", run_dir) > 5, "merges of the syncer's next pod")
        here.stop()
        assert [here.exit_code(process) for process in (*learners, syncer)] == [0, 0, 0], here.text()
    summary = check_run(run_dir)
    assert summary["status"] == "finished" and [x["incarnations"] for x in summary["learners"]] == [1, 2]
    assert all(x["rounds_merged"] > 0 for x in summary["learners"])
