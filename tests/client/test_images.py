"""The deployment files: what they start, in which order, and that they say what the package says.

A chart is rendered where this machine has `helm`; what it says of the service is checked on its text anywhere.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from benchmarks.image import instructions
from starlette.routing import Match

from evenodds_service.api.app import create_app
from evenodds_service.settings import Settings
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Store

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/evenodds"
TEMPLATES = {path.name: path.read_text() for path in (CHART / "templates").iterdir()}
HELM = shutil.which("helm")
with_helm = pytest.mark.skipif(HELM is None, reason="no helm on this machine")
OURS = {"migrate", "api", "worker", "worker-gpu"}


@pytest.fixture
def services() -> dict[str, Any]:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return dict(compose["services"])


@pytest.fixture
def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage, those of the stages that it stands on first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions((ROOT / "Dockerfile").read_text()):
        if word == "FROM":
            parent, _, name = rest.split()
            found[name] = list(found.get(parent, [("FROM", parent)]))
        else:
            found[name].append((word, rest))
    return found


@pytest.fixture
def values() -> dict[str, Any]:
    return dict(yaml.safe_load((CHART / "values.yaml").read_text()))


def rendered(*settings: str, options: Sequence[str] = ()) -> dict[tuple[str, str], dict[str, Any]]:
    """Kubernetes objects by kind and name."""
    assert HELM is not None
    sets = [*options, *(word for setting in settings for word in ("--set", setting))]
    done = subprocess.run([HELM, "template", "demo", str(CHART), *sets], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {(o["kind"], o["metadata"]["name"]): o for o in yaml.safe_load_all(done.stdout) if o}


def test_compose_starts_database_migration_replicas_behind_a_proxy_and_worker(services: dict[str, Any]) -> None:
    started = {name: service.get("command") for name, service in services.items() if "profiles" not in service}
    optional = {name: service["profiles"] for name, service in services.items() if "profiles" in service}

    assert started == {
        "postgres": None,
        "migrate": ["evenodds", "migrate"],
        "api": ["evenodds", "serve"],
        "proxy": None,
        "worker": ["evenodds", "work"],
    }
    assert optional == {"worker-gpu": ["gpu"], "prometheus": ["monitoring"], "grafana": ["monitoring"]}


def test_api_and_worker_wait_for_the_migration_and_it_for_the_database(services: dict[str, Any]) -> None:
    waits = {name: services[name]["depends_on"] for name in OURS}

    migrated = {"migrate": {"condition": "service_completed_successfully"}}
    assert waits == {
        "migrate": {"postgres": {"condition": "service_healthy"}},
        "api": migrated,
        "worker": migrated,
        "worker-gpu": migrated,
    }
    assert services["migrate"]["restart"] == "no"
    assert "pg_isready" in services["postgres"]["healthcheck"]["test"]


def test_all_parts_use_the_database_that_compose_starts(services: dict[str, Any]) -> None:
    database = services["postgres"]["environment"]
    user, password, name = (database[f"POSTGRES_{part}"] for part in ("USER", "PASSWORD", "DB"))
    url = f"postgresql+psycopg://{user}:{password}@postgres:5432/{name}"

    assert {services[part]["environment"]["EVENODDS_DATABASE_URL"] for part in OURS} == {url}


def test_compose_builds_the_stage_of_each_part(
    services: dict[str, Any], stages: dict[str, list[tuple[str, str]]]
) -> None:
    targets = {name: services[name]["build"]["target"] for name in OURS}

    assert targets == {"migrate": "api", "api": "api", "worker": "worker", "worker-gpu": "worker"}
    by_image = {(services[name]["image"], json.dumps(services[name]["build"], sort_keys=True)) for name in OURS}
    assert len({image for image, _ in by_image}) == len(by_image) == 3
    arguments = {rest.partition("=")[0] for word, rest in stages["build-worker"] if word == "ARG"}
    assert set(services["worker-gpu"]["build"]["args"]) == arguments == {"TORCH_INDEX"}


def test_ports_are_published_on_this_machine_only(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}

    assert published == {
        "proxy": ["127.0.0.1:8000:8000"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "grafana": ["127.0.0.1:3000:3000"],
    }


def test_compose_answers_to_names_of_this_machine_alone_unless_told_others(services: dict[str, Any]) -> None:
    """Without keys a page whose own name leads to this machine could read and write: only `Host` tells."""
    given = services["api"]["environment"]["EVENODDS_ALLOWED_HOSTS"]
    found = re.fullmatch(r"\$\{EVENODDS_ALLOWED_HOSTS:-(.*)\}", given)

    assert found is not None
    assert Settings(allowed_hosts=found[1]).host_names() == ("localhost", "127.0.0.1")


def test_the_proxy_and_prometheus_find_each_api_replica(services: dict[str, Any]) -> None:
    (scraped,) = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    proxy = (ROOT / "deploy/haproxy.cfg").read_text()

    assert "deploy" in services["api"]
    assert scraped["dns_sd_configs"] == [{"names": ["api"], "type": "A", "port": 8000}]
    assert re.search(r"server-template api \d+ api:8000 check", proxy)
    assert "option httpchk GET /readyz" in proxy
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


def test_what_compose_mounts_exists(services: dict[str, Any]) -> None:
    mounts = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())]
    files = [ROOT / path for path in mounts if path.startswith("./")]

    assert len(files) == 4
    assert all(path.exists() for path in files)
    assert {path for path in mounts if not path.startswith("./")} == {"database", "metrics"}


def test_the_dashboard_is_where_grafana_looks(services: dict[str, Any]) -> None:
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/evenodds.yml").read_text())[
        "providers"
    ]
    inside = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]

    assert f"{provider['options']['path']}/evenodds.json" in inside


def test_the_database_outlives_its_container(services: dict[str, Any]) -> None:
    assert services["postgres"]["volumes"] == ["database:/var/lib/postgresql/data"]


def test_the_images_run_as_an_ordinary_user(stages: dict[str, list[tuple[str, str]]]) -> None:
    for name in ("api", "worker"):
        assert dict(stages[name])["USER"] == "10001:10001"
    assert dict(stages["worker"])["CMD"] == '["evenodds", "work"]'
    assert "HEALTHCHECK" not in dict(stages["worker"])  # it has no port: it ends where it cannot go on


def test_the_api_image_is_the_default_and_serves(stages: dict[str, list[tuple[str, str]]]) -> None:
    last = dict(stages["api"])

    assert list(stages)[-1] == "api"
    assert last["CMD"] == '["evenodds", "serve"]'
    assert last["ENV"] == "EVENODDS_HOST=0.0.0.0"
    assert last["EXPOSE"] == "8000"
    assert "/readyz" in last["HEALTHCHECK"]


def test_the_image_is_given_what_it_copies_and_no_more(stages: dict[str, list[tuple[str, str]]]) -> None:
    copies = [rest.split()[:-1] for word, rest in stages["build-api"] if word == "COPY"]
    copied = {source for sources in copies for source in sources}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()

    assert copied == {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)


def test_the_images_install_what_was_tested(stages: dict[str, list[tuple[str, str]]]) -> None:
    runs = [rest for word, rest in stages["build-worker"] if word == "RUN"]
    installs = [part for run in runs for part in run.split("&&") if " install " in part]

    ours = [install for install in installs if "/opt/evenodds/bin/python" in install]
    assert all("--constraint constraints.txt" in install for install in ours)
    assert [install.split()[-1] for install in ours] == ["'.[api,telemetry]'", "torch", "'.[service,telemetry]'"]


def test_the_service_is_the_api_and_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {
        extra: {re.split(r"[<>=\[]", line)[0] for line in lines}
        for extra, lines in project["optional-dependencies"].items()
    }

    assert names["service"] == {"evenodds", "sentence-transformers", "torch"}
    assert project["optional-dependencies"]["service"][0] == "evenodds[api]"
    assert not names["api"] & {"sentence-transformers", "torch", "transformers", "scikit-learn"}


def test_constraints_name_one_version_of_each_package_and_no_place_to_get_it() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]

    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert "torch==2.13.0" in lines


def test_every_variable_of_the_deployment_is_a_setting() -> None:
    texts = [(ROOT / name).read_text() for name in ("Dockerfile", "docker-compose.yml")] + list(TEMPLATES.values())
    variables = {name for text in texts for name in re.findall(r"EVENODDS_([A-Z_]+[A-Z])\b", text)}

    of_compose_alone = {"REPLICAS"}
    assert {name.lower() for name in variables - of_compose_alone} <= set(Settings.model_fields)
    assert "DATABASE_URL" in variables


def test_the_chart_takes_every_setting_that_it_does_not_set_itself() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    taken = schema["properties"]["settings"]["propertyNames"]["enum"]

    assert set(taken) == set(Settings.model_fields) - {"host", "port", "access", "database_url", "data"}


def test_probes_and_scrapes_ask_for_routes_that_exist() -> None:
    app = create_app(Store(open_engine("sqlite:///never-opened.db")))
    compose = (ROOT / "deploy/haproxy.cfg").read_text() + (ROOT / "Dockerfile").read_text()
    paths = set(re.findall(r"(?:path: |GET |\+ \')(/[a-z]+)", "".join(TEMPLATES.values()) + compose))

    assert paths == {"/healthz", "/readyz", "/metrics"}
    for path in paths:
        scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []}
        assert any(route.matches(scope)[0] is Match.FULL for route in app.routes), path


def test_every_value_is_used_and_every_used_value_exists(values: dict[str, Any]) -> None:
    text = "".join(TEMPLATES.values())
    used = {tuple(path.split(".")) for path in re.findall(r"\.Values\.([A-Za-z.]+)", text)}

    def leaves(tree: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
        if not isinstance(tree, dict) or not tree:
            return {path}
        return {leaf for name, below in tree.items() for leaf in leaves(below, (*path, name))}

    images = {(part, "image", key) for part in ("api", "worker") for key in ("repository", "tag")}
    known = leaves(values)
    for path in used:
        assert any(leaf[: len(path)] == path for leaf in known), f"values.yaml lacks {'.'.join(path)}"
    for leaf in known - images:  # of which the helper is given the whole
        assert any(leaf[: len(path)] == path for path in used), f"no template uses {'.'.join(leaf)}"


def test_the_chart_asks_for_keys_unless_told_otherwise(values: dict[str, Any]) -> None:
    assert values["access"] == "keys"
    assert "evenodds keys create NAME" in TEMPLATES["NOTES.txt"]


def test_the_chart_and_the_package_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert chart["appVersion"] == chart["version"] == project["version"]


@with_helm
def test_the_chart_renders_what_it_says() -> None:
    objects = rendered()

    assert set(objects) == {
        ("Deployment", "demo-evenodds-api"),
        ("Deployment", "demo-evenodds-worker"),
        ("Service", "demo-evenodds"),
        ("HorizontalPodAutoscaler", "demo-evenodds-api"),
        ("PodDisruptionBudget", "demo-evenodds-api"),
        ("Job", "demo-evenodds-migration"),
        ("NetworkPolicy", "demo-evenodds-api"),
        ("NetworkPolicy", "demo-evenodds-worker"),
        ("NetworkPolicy", "demo-evenodds-migration"),
    }
    pods = {name: o["spec"]["template"] for (kind, name), o in objects.items() if kind in ("Deployment", "Job")}
    for name, pod in pods.items():
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["enableServiceLinks"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "evenodds-database", "key": "url"}
        policy = objects["NetworkPolicy", name]["spec"]["podSelector"]["matchLabels"]
        assert policy.items() <= pod["metadata"]["labels"].items()
    assert "replicas" not in objects["Deployment", "demo-evenodds-api"]["spec"]  # the autoscaler's
    service = objects["Service", "demo-evenodds"]["spec"]["selector"]
    assert service.items() <= pods["demo-evenodds-api"]["metadata"]["labels"].items()
    assert not service.items() <= pods["demo-evenodds-worker"]["metadata"]["labels"].items()


@with_helm
def test_a_worker_with_a_gpu_asks_for_it_and_does_without_a_cpu_in_its_place() -> None:
    worker = rendered("worker.gpu.enabled=true")["Deployment", "demo-evenodds-worker"]
    (container,) = worker["spec"]["template"]["spec"]["containers"]

    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1, "memory": "4Gi"}
    assert {"name": "EVENODDS_DEVICE", "value": "cuda"} in container["env"]


def test_no_template_writes_a_number_as_go_writes_a_float() -> None:
    """A whole number of a values file is a float there, and toString would make 1e+06 of a million."""
    helpers = TEMPLATES["_helpers.tpl"]

    assert not [name for name, text in TEMPLATES.items() if "toString" in text]
    assert "{{ if eq . (floor .) }}{{ int64 . }}" in helpers
    assert 'value: {{ include "evenodds.text" $value | quote }}' in helpers


@with_helm
def test_settings_of_a_values_file_reach_the_service_as_they_stand_there(tmp_path: Path) -> None:
    given = {"decisions": 1_000_000, "predict_staleness_ms": 0.5, "telemetry": True, "log_level": "debug"}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"settings": given}))

    objects = rendered(options=("--values", str(tmp_path / "values.yaml")))

    api = objects["Deployment", "demo-evenodds-api"]
    (container,) = api["spec"]["template"]["spec"]["containers"]
    values = {each["name"]: each.get("value") for each in container["env"]}
    assert (
        values.items()
        >= {
            "EVENODDS_DECISIONS": "1000000",
            "EVENODDS_PREDICT_STALENESS_MS": "0.5",
            "EVENODDS_TELEMETRY": "true",
            "EVENODDS_LOG_LEVEL": "debug",
        }.items()
    )


@with_helm
def test_a_setting_that_does_not_exist_is_refused() -> None:
    assert HELM is not None
    done = subprocess.run(
        [HELM, "template", str(CHART), "--set", "settings.predict_stalenes_ms=1"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode != 0
    assert "predict_stalenes_ms" in done.stderr
    assert "predict_staleness_ms" in done.stderr
