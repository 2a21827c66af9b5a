"""The service and trainings on Kubernetes and Ray: manifests that its schemas take, and replicas that answer."""

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError
from service import PATIENT, publish

from app.on_ray import Args
from app.settings import Settings
from distillers.cli import app
from distillers.generator import Generator
from distillers.jobs.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
MANIFESTS = sorted((ROOT / "docs" / "kubernetes").glob("*.yaml"))
BUILT_IN = [file for file in MANIFESTS if file.name != "keda.yaml"]  # whose kinds Kubernetes itself knows


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def pods() -> list[Any]:
    found = [(file, one) for file in MANIFESTS for one in documents(file) if one["kind"] in ("Deployment", "Job")]
    return [pytest.param(one["spec"]["template"]["spec"], id=f"{file.name}-{i}") for i, (file, one) in enumerate(found)]


@pytest.mark.parametrize("file", BUILT_IN, ids=lambda file: file.name)
def test_manifests_are_what_kubernetes_takes(file: Path) -> None:
    """Unknown fields count as wrong."""
    assert documents(file)
    for document in documents(file):
        kubernetes_validate.validate(document, "1.34", strict=True)


@pytest.mark.parametrize("pod", pods())
def test_pods_run_what_the_image_has_and_as_nobody(pod: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    user, home = re.search(r"--home-dir (\S+) --uid (\d+)", dockerfile).group(2, 1)  # type: ignore[union-attr]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == int(user)
    kept = {volume["name"] for volume in pod["volumes"]}
    settings = {f"FEWSTEP_{name.upper()}" for name in Settings.model_fields}
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        assert container["image"] in ("fewstep", "fewstep-distill")
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= kept
        assert {one["name"] for one in container.get("env", []) if one["name"][:8] == "FEWSTEP_"} <= settings
    assert f"{home}/weights" in {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}


def test_a_pod_has_the_time_that_its_requests_have() -> None:
    (service,) = [one for one in documents(ROOT / "docs/kubernetes/serve.yaml") if one["kind"] == "Deployment"]
    pod = service["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain = float({one["name"]: one["value"] for one in container["env"]}["FEWSTEP_DRAIN_SECONDS"])
    assert pod["terminationGracePeriodSeconds"] >= container["lifecycle"]["preStop"]["sleep"]["seconds"] + drain + 5
    probes = {container[kind]["httpGet"]["path"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {"/livez", "/readyz"}
    gauge = documents(ROOT / "docs/kubernetes/autoscale.yaml")[0]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    query = documents(ROOT / "docs/kubernetes/keda.yaml")[0]["spec"]["triggers"][0]["metadata"]["query"]
    assert f'"{gauge}"' in (ROOT / "app/telemetry/metrics.py").read_text() and query == f"sum({gauge})"


def test_an_empty_volume_starts_with_the_folders_of_the_image(tmp_path: Path) -> None:
    (service,) = [one for one in documents(ROOT / "docs/kubernetes/serve.yaml") if one["kind"] == "Deployment"]
    (first,) = service["spec"]["template"]["spec"]["initContainers"]
    *command, _, _ = first["command"]
    image, volume = tmp_path / "image", tmp_path / "volume"
    for folder in ("image/a", "volume"):
        (tmp_path / folder).mkdir(parents=True)
    (image / "a" / "fewstep.json").write_text("{}")
    subprocess.run([*command, str(volume), str(image)], check=True)
    assert (volume / "a" / "fewstep.json").read_text() == "{}"
    (volume / "a").rename(volume / "trained")
    subprocess.run([*command, str(volume), str(image)], check=True)
    assert [one.name for one in volume.iterdir()] == ["trained"], "what is there is let be"


def test_jobs_name_recipes_and_options_that_there_are() -> None:
    recipe = documents(ROOT / "docs/kubernetes/distill.yaml")[0]["spec"]["template"]["spec"]["containers"][0]["args"][0]
    assert Recipe.load(recipe).name == recipe
    students, merge = documents(ROOT / "docs/kubernetes/multi-student.yaml")
    name, student, *_, out = students["spec"]["template"]["spec"]["containers"][0]["args"]
    count = students["spec"]["completions"]
    for k in range(count):
        one = Recipe.load(name, [student.replace("$(STUDENT)", str(k))])
        assert one.options["student"] == k and one.options["students"] == count
    assert merge["spec"]["suspend"]
    command = merge["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[2 : 2 + count] == [out.replace("$(STUDENT)", str(k)) for k in range(count)]
    assert command[1] in {one.name or one.callback.__name__ for one in app.registered_commands}  # type: ignore[union-attr]


PROGRAM = """
import json, sys, urllib.request
import ray
from ray import serve
from app.on_ray import Args, application

weights, port, body = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"port": port})
serve.run(application(Args(weights=weights, cpus=1, min_replicas=2)))
address = f"http://127.0.0.1:{port}"
asked = urllib.request.Request(f"{address}/v1/images/generations", body, {"Content-Type": "application/json"})
answers = [json.load(urllib.request.urlopen(asked)) for _ in range(6)]
ready = json.load(urllib.request.urlopen(f"{address}/readyz"))
replicas = serve.status().applications["default"].deployments["fewstep"].replica_states
serve.shutdown()
ray.shutdown()
print(json.dumps([answers, ready, {str(getattr(k, "value", k)): n for k, n in replicas.items()}]))
"""


@pytest.mark.slow
@pytest.mark.process
def test_replicas_on_ray_draw_what_the_library_draws(tmp_path: Path) -> None:
    """Ray is started, with two replicas of the whole service behind its proxy."""
    publish(tmp_path, "student", "class-to-image", teacher="t", labels=["a", "b"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    body = {"model": "student", "prompt": "b", "seed": 5}
    environment = {**os.environ, **PATIENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(port), json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    answers, ready, replicas = json.loads(done.stdout.splitlines()[-1])
    assert ready["models"] == ["student"] and replicas == {"RUNNING": 2}
    drawn = Generator.from_pretrained(tmp_path / "student").sample([5], labels=[1])[0]
    own = ((drawn.permute(1, 2, 0).numpy() + 1) * 127.5).round().clip(0, 255)
    for answer in answers:
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))), float)
        assert np.abs(picture - own).max() <= 1


def test_what_a_replica_cannot_be_told_is_refused() -> None:
    for wrong in ({"wieghts": "w"}, {"device": "mps"}, {"cpus": 0}, {"min_replicas": 0}, {"weights": "nowhere"}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            Args(**wrong)
