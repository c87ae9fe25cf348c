"""A Kubernetes of folders and processes, for `docs/sites/kubernetes.yaml`: volumes with the modes that a kubelet gives them, containers as
processes of this machine that see them under the same paths (which are exchanged in their commands)."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tests.doc_pages import ROOT
from tests.sites.kit import Site

FILE = "docs/sites/kubernetes.yaml"


class Cluster:
    """Objects by kind and name; what `kubectl` of the page made lies in `objects`."""

    def __init__(self, here: Site) -> None:
        self.here, self.folder = here, here.folder / "cluster"
        self.folder.mkdir()
        self.objects: dict[tuple[str, str], dict[str, bytes]] = {}
        self.documents = {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all((ROOT / FILE).read_text("utf-8"))}
        self._made: Counter[str] = Counter()

    def kubectl(self, line: str) -> None:
        """Do what a line of the page says."""
        _, verb, *words = shlex.split(line)
        if verb == "apply":
            assert words == ["-f", FILE]
            return
        kind = "configMap" if words[0] == "configmap" else "secret"
        name, *options = words[1:] if kind == "configMap" else words[2:]
        assert verb == "create" and (kind == "configMap" or words[1] == "generic")
        paths = [self.here.folder / option.removeprefix("--from-file=") for option in options]
        files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        self.objects[kind, name] = {file.name: file.read_bytes() for file in files}

    def service_endpoint(self) -> str:
        """The address that learners are to dial; its ports and its selector fit the syncer's."""
        ((_, name),) = [key for key in self.documents if key[0] == "Service"]
        service, template = self.documents["Service", name]["spec"], self.documents["Job", name]["spec"]["template"]
        assert service["selector"].items() <= template["metadata"]["labels"].items()
        (container,) = template["spec"]["containers"]
        assert (
            [p["containerPort"] for p in container["ports"]]
            == [p["port"] for p in service["ports"]]
            == [p["targetPort"] for p in service["ports"]]
        )
        control, bulk = (p["port"] for p in service["ports"])
        assert bulk == control + 1
        return f"tcp://{name}:{control}"

    def pod(self, job: str, **variables: str) -> Pod:
        """A new pod of a Job."""
        self._made[job] += 1
        return Pod(self, self.documents["Job", job]["spec"]["template"]["spec"], self.folder / f"{job}-{self._made[job]}", variables)


class Pod:
    """Volumes of one pod, and its containers."""

    def __init__(self, cluster: Cluster, spec: dict[str, Any], folder: Path, variables: dict[str, str]) -> None:
        self.cluster, self.spec, self.folder, self.variables = cluster, spec, folder, variables
        folder.mkdir()
        self.volumes = {volume["name"]: self._volume(volume) for volume in spec["volumes"]}

    def _volume(self, volume: dict[str, Any]) -> Path:
        path = self.folder / volume["name"]
        if claim := volume.get("persistentVolumeClaim"):
            assert ("PersistentVolumeClaim", claim["claimName"]) in self.cluster.documents
            path = self.cluster.folder / claim["claimName"]
            path.mkdir(exist_ok=True)
        elif "emptyDir" in volume:
            path.mkdir()
        else:
            (kind,) = {"secret", "configMap"} & set(volume)
            source = volume[kind]
            mode = source.get("defaultMode", 0o644)
            mount(path, self.cluster.objects[kind, source.get("secretName") or source["name"]], mode, self.spec["securityContext"])
        # As they come from a kubelet: the group of the pod may write, and so may everybody else.
        path.chmod(0o3777 if volume.keys() & {"secret", "configMap"} else 0o2777)
        return path

    def start(self, container: dict[str, Any]) -> subprocess.Popen[bytes]:
        """Start a container's command."""
        mounts = {m["mountPath"]: self.volumes[m["name"]] / m.get("subPath", "") for m in container["volumeMounts"]}
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        work = container.get("workingDir")
        if work is not None:
            shutil.copy(self.cluster.here.folder / "my_script.py", home)
            for name, target in {"stop": self.cluster.here.folder / "stop", **{Path(p).name: t for p, t in mounts.items()}}.items():
                (home / name).symlink_to(target)
        port = self.cluster.here.port
        words = []
        for word in container["command"]:
            for path in sorted(mounts, key=len, reverse=True):
                word = word.replace(f"{path}/", f"{mounts[path]}/")
            word = word.replace("tcp://0.0.0.0:7777", f"tcp://0.0.0.0:{port}")
            words.append(word.replace(self.cluster.service_endpoint(), f"tcp://127.0.0.1:{port}"))
        given = {entry["name"]: entry["value"] for entry in container.get("env", [])}
        return self.cluster.here.start(*words, cwd=home, **{**given, "OMP_NUM_THREADS": "1", **self.variables})

    def run(self) -> subprocess.Popen[bytes]:
        """Run the init containers, then start the one that stays."""
        for container in self.spec["initContainers"]:
            assert self.cluster.here.exit_code(self.start(container)) == 0, self.cluster.here.text()
        (container,) = self.spec["containers"]
        return self.start(container)


def mount(path: Path, files: dict[str, bytes], mode: int, context: dict[str, Any]) -> None:
    """Lay files out as a kubelet does: in a folder with a date, behind a link, readable by the pod's group."""
    dated = path / "..2026_01_01_00_00_00.0"
    dated.mkdir(parents=True)
    (path / "..data").symlink_to(dated.name)
    for name, content in files.items():
        (dated / name).write_bytes(content)
        (dated / name).chmod(mode | (0o440 if "fsGroup" in context else 0))
        (path / name).symlink_to(f"..data/{name}")
