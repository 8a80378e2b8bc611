"""What can be known about deploy/ without a cluster: that it parses, fits its schemas, and fits together.

Run by `cargo test` (tests/tests/deploy.rs), or by hand: .venv/bin/python -m unittest discover -s deploy/tests
BATON_BINARY names the binary whose `--help` the flags are compared with; without it that part is skipped.
"""

import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import threading
import tomllib
import unittest

import kubernetes_validate
import yaml

DEPLOY = pathlib.Path(__file__).resolve().parent.parent
ROOT = DEPLOY.parent
BASE = DEPLOY / "kubernetes/base"
EXAMPLE = DEPLOY / "kubernetes/overlays/example"
TLS = DEPLOY / "kubernetes/components/link-tls"
WORKLOADS = ("Deployment", "StatefulSet")


def documents(path):
    """Returns the documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def kustomization(folder):
    """Returns the one document of a folder's kustomization."""
    (document,) = documents(folder / "kustomization.yaml")
    return document


def resource_files(folder):
    """Yields the files a kustomization takes its resources from, its bases' included."""
    for name in kustomization(folder)["resources"]:
        path = (folder / name).resolve()
        if path.is_dir():
            yield from resource_files(path)
        else:
            yield path


def render(folder):
    """Returns the manifests of a kustomization: as kubectl renders them, or, without kubectl, as they lie in their files."""
    if shutil.which("kubectl"):
        rendered = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
        assert rendered.returncode == 0, rendered.stderr
        return [document for document in yaml.safe_load_all(rendered.stdout) if document]
    return [document for path in resource_files(folder) for document in documents(path)]


def name(manifest):
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def selects(selector, labels):
    """Whether a selector (plain labels, or matchLabels and matchExpressions) selects these labels."""
    if "matchLabels" not in selector and "matchExpressions" not in selector:
        selector = {"matchLabels": selector}
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions), expressions
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


class Rendered:
    """The manifests of one kustomization, by what one asks of them."""

    def __init__(self, folder):
        self.manifests = render(folder)

    def of(self, *kinds):
        return [manifest for manifest in self.manifests if manifest["kind"] in kinds]

    def workloads(self):
        """Yields (manifest, pod labels, pod spec, its only container)."""
        for manifest in self.of(*WORKLOADS):
            template = manifest["spec"]["template"]
            (container,) = template["spec"]["containers"]
            yield manifest, template["metadata"]["labels"], template["spec"], container

    def baton_workloads(self):
        for workload in self.workloads():
            if workload[1].get("app.kubernetes.io/name") == "baton":
                yield workload


def with_component(component):
    """Renders the example with a component."""
    # kustomize takes relative paths alone.
    with tempfile.TemporaryDirectory(dir=EXAMPLE.parent) as folder:
        overlay = pathlib.Path(folder)
        settings = {"namespace": "baton", "resources": ["../example"], "components": [f"../../components/{component}"]}
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(settings))
        return Rendered(overlay)


EACH = {"base": BASE, "example": EXAMPLE}


class EachKustomization(unittest.TestCase):
    """Runs a test for each kustomization."""

    @classmethod
    def setUpClass(cls):
        cls.rendered = [Rendered(folder) for folder in EACH.values()]

    def each(self):
        return self.rendered


class Files(unittest.TestCase):
    def test_every_manifest_belongs_to_a_kustomization(self):
        used = {path for folder in EACH.values() for path in resource_files(folder)}
        there = {path for path in (DEPLOY / "kubernetes").rglob("*.yaml") if path.name != "kustomization.yaml"}
        self.assertEqual(there, used)

    def test_resources_are_unique(self):
        for which, folder in EACH.items():
            names = [name(manifest) for path in resource_files(folder) for manifest in documents(path)]
            self.assertEqual(len(names), len(set(names)), which)

    def test_patches_images_and_replicas_aim_at_something(self):
        example = kustomization(EXAMPLE)
        workloads = [manifest for path in resource_files(EXAMPLE) for manifest in documents(path) if manifest["kind"] in WORKLOADS]
        images = {container["image"] for manifest in workloads for container in manifest["spec"]["template"]["spec"]["containers"]}
        self.assertEqual({image["name"] for image in example["images"]}, images)
        self.assertLessEqual({replica["name"] for replica in example["replicas"]}, {m["metadata"]["name"] for m in workloads})
        for patch in example["patches"]:
            kinds = patch["target"]["kind"].split("|")
            self.assertTrue(any(manifest["kind"] in kinds for manifest in workloads), patch)


class Schema(EachKustomization):
    def test_manifests_fit_the_schemas_of_kubernetes(self):
        version = kubernetes_validate.latest_version()
        for rendered in self.each():
            for manifest in rendered.manifests:
                kubernetes_validate.validate(manifest, version, strict=True)


class Selectors(EachKustomization):
    def test_workloads_select_their_own_pods_and_no_others(self):
        for rendered in self.each():
            for manifest, labels, _, _ in rendered.workloads():
                selected = [name(other) for other, theirs, _, _ in rendered.workloads() if selects(manifest["spec"]["selector"], theirs)]
                self.assertEqual(selected, [name(manifest)])
                self.assertTrue(labels)

    def test_services_budgets_and_policies_select_pods(self):
        for rendered in self.each():
            pods = [labels for _, labels, _, _ in rendered.workloads()]
            for manifest in rendered.of("Service", "PodDisruptionBudget", "NetworkPolicy"):
                spec = manifest["spec"]
                selector = spec["podSelector"] if manifest["kind"] == "NetworkPolicy" else spec["selector"]
                self.assertTrue(any(selects(selector, labels) for labels in pods), name(manifest))

    def test_stateful_sets_have_their_headless_service(self):
        for rendered in self.each():
            services = {service["metadata"]["name"]: service for service in rendered.of("Service")}
            for manifest, labels, _, _ in rendered.workloads():
                if manifest["kind"] == "StatefulSet":
                    service = services[manifest["spec"]["serviceName"]]
                    self.assertEqual(service["spec"]["clusterIP"], "None", name(service))
                    self.assertTrue(selects(service["spec"]["selector"], labels), name(manifest))

    def test_every_part_of_baton_can_be_scaled_and_disrupted_on_its_own(self):
        for rendered in self.each():
            parts = {labels["app.kubernetes.io/component"] for _, labels, _, _ in rendered.baton_workloads()}
            self.assertEqual(parts, {"router", "prefill", "decode"})
            for _, labels, _, _ in rendered.baton_workloads():
                budgets = [b for b in rendered.of("PodDisruptionBudget") if selects(b["spec"]["selector"], labels)]
                self.assertEqual(len(budgets), 1, labels)


def named_ports(container):
    return {port["name"]: port["containerPort"] for port in container["ports"]}


class Ports(EachKustomization):
    def test_services_aim_at_ports_their_pods_have(self):
        for rendered in self.each():
            for service in rendered.of("Service"):
                for _, labels, _, container in rendered.workloads():
                    if selects(service["spec"]["selector"], labels):
                        targets = {port["targetPort"] for port in service["spec"]["ports"]}
                        self.assertLessEqual(targets, set(named_ports(container)), name(service))

    def test_policies_let_in_what_pods_listen_on(self):
        for rendered in self.each():
            for policy in rendered.of("NetworkPolicy"):
                for rule in policy["spec"].get("ingress", []):
                    for _, labels, _, container in rendered.workloads():
                        if selects(policy["spec"]["podSelector"], labels):
                            ports = {port["port"] for port in rule["ports"]}
                            self.assertLessEqual(ports, set(named_ports(container)), name(policy))

    def test_what_is_sent_to_a_pod_is_let_in_there(self):
        for rendered in self.each():
            for policy in rendered.of("NetworkPolicy"):
                for rule in policy["spec"].get("egress", []):
                    for peer in rule.get("to", []):
                        if "namespaceSelector" not in peer:
                            self.check_peer(rendered, policy, peer["podSelector"], rule["ports"])

    def check_peer(self, rendered, policy, selector, ports):
        listening = [named_ports(container) for _, labels, _, container in rendered.workloads() if selects(selector, labels)]
        self.assertTrue(listening, name(policy))
        for port in ports:
            for there in listening:
                self.assertIn(port["port"], there.values(), name(policy))

    def test_listeners_are_the_ports_of_the_pod(self):
        flags = {"--listen": ("http", "grpc"), "--link-listen": ("link",), "--admin-listen": ("admin",)}
        for rendered in self.each():
            for manifest, _, _, container in rendered.baton_workloads():
                listening = {}
                for argument in container["args"][1:]:
                    flag, _, value = argument.partition("=")
                    for port in flags.get(flag, ()):
                        host, _, number = value.rpartition(":")
                        self.assertEqual(host, "0.0.0.0", name(manifest))
                        listening[port] = int(number)
                ports = named_ports(container)
                self.assertEqual({port: number for port, number in listening.items() if port in ports}, ports, name(manifest))


class Pods(EachKustomization):
    def test_probes(self):
        for rendered in self.each():
            for manifest, labels, _, container in rendered.workloads():
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    self.assertIn(container[probe]["httpGet"]["port"], named_ports(container), f"{name(manifest)} {probe}")
                if labels["app.kubernetes.io/name"] == "baton":
                    self.assertEqual(container["readinessProbe"]["httpGet"]["path"], "/readyz", name(manifest))
                    self.assertEqual(container["livenessProbe"]["httpGet"]["path"], "/livez", name(manifest))

    def test_the_grace_period_holds_the_drain(self):
        for rendered in self.each():
            for manifest, labels, pod, container in rendered.baton_workloads():
                command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
                self.assertEqual(command, "sleep")
                settings = {variable["name"]: variable.get("value") for variable in container["env"]}
                drain = settings.get("BATON_DRAIN_TIMEOUT", "30s")
                self.assertTrue(drain.endswith("s"), drain)
                needed = int(seconds) + int(drain[:-1])
                self.assertGreater(pod["terminationGracePeriodSeconds"], needed, name(manifest))

    def test_workers_outlast_routers_that_still_take_requests(self):
        for rendered in self.each():
            waits = {}
            for _, labels, _, container in rendered.baton_workloads():
                waits[labels["app.kubernetes.io/component"]] = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
            self.assertGreater(min(waits["prefill"], waits["decode"]), waits["router"])

    def test_nothing_is_privileged(self):
        for rendered in self.each():
            for manifest, _, pod, container in rendered.workloads():
                self.assertTrue(pod["securityContext"]["runAsNonRoot"], name(manifest))
                self.assertEqual(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", name(manifest))
                self.assertFalse(pod["automountServiceAccountToken"], name(manifest))
                self.assertFalse(pod["enableServiceLinks"], name(manifest))
                security = container["securityContext"]
                self.assertFalse(security["allowPrivilegeEscalation"], name(manifest))
                self.assertTrue(security["readOnlyRootFilesystem"], name(manifest))
                self.assertEqual(security["capabilities"]["drop"], ["ALL"], name(manifest))
                self.assertIn("memory", container["resources"]["limits"], name(manifest))
                self.assertEqual(set(container["resources"]["requests"]), {"cpu", "memory"}, name(manifest))

    def test_others_are_told_the_address_of_the_pod(self):
        for rendered in self.each():
            for manifest, _, _, container in rendered.baton_workloads():
                fields = {v["name"]: v["valueFrom"]["fieldRef"]["fieldPath"] for v in container["env"] if "valueFrom" in v}
                self.assertEqual(fields, {"BATON_NAME": "metadata.name", "BATON_ADVERTISE": "status.podIP"}, name(manifest))


class Links(EachKustomization):
    """Hand-offs want a token, and TLS where it is asked for; workers get cards likewise."""

    def test_workers_are_given_the_token(self):
        for rendered in self.each():
            for manifest, labels, pod, container in rendered.baton_workloads():
                settings = {variable["name"]: variable.get("value") for variable in container["env"]}
                if labels["app.kubernetes.io/component"] == "router":
                    self.assertNotIn("BATON_CLUSTER_TOKEN_FILE", settings, name(manifest))
                    continue
                (mount,) = container["volumeMounts"]
                (volume,) = pod["volumes"]
                self.assertEqual(settings["BATON_CLUSTER_TOKEN_FILE"], f"{mount['mountPath']}/token", name(manifest))
                self.assertEqual((volume["name"], volume["secret"]["secretName"]), (mount["name"], "baton-links"), name(manifest))
                # The user of the image reads it as its group.
                self.assertEqual((volume["secret"]["defaultMode"], pod["securityContext"]["fsGroup"]), (0o440, 10001))

    def test_certificates_are_where_the_settings_say(self):
        mount, *settings = kustomization(TLS)["patches"]
        pod = yaml.safe_load(mount["patch"])["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (generator,) = kustomization(TLS)["configMapGenerator"]
        for patch in settings:
            role = patch["target"]["name"].removeprefix("baton-")
            (added,) = yaml.safe_load(patch["patch"])
            self.assertEqual(added["value"]["name"], "BATON_CONFIG")
            folder, _, file = added["value"]["value"].rpartition("/")
            self.assertEqual(volumes[mounts[folder]]["configMap"]["name"], generator["name"])
            self.assertIn(file, generator["files"])
            # A worker refuses tables that are not its own.
            ((table, contents),) = tomllib.loads((TLS / file).read_text()).items()
            self.assertEqual(table, f"{role}-worker")
            tls = contents["transfer"]["tls"]
            paths = {setting: tls[setting].rpartition("/") for setting in ("ca", "cert", "key")}
            self.assertEqual({setting: path[2] for setting, path in paths.items()}, {"ca": "ca.crt", "cert": "tls.crt", "key": "tls.key"})
            for folder, _, _ in paths.values():
                self.assertEqual(volumes[mounts[folder]]["secret"]["secretName"], "baton-link-tls")

    @unittest.skipUnless(shutil.which("kubectl"), "kubectl is not installed")
    def test_certificates_are_added_to_both_pools(self):
        rendered = with_component("link-tls")
        maps = {manifest["metadata"]["name"] for manifest in rendered.of("ConfigMap")}
        for manifest, _, pod, container in self.pools(rendered):
            (config,) = [volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume]
            self.assertIn(config, maps, name(manifest))
            secrets = {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
            self.assertEqual(secrets, {"baton-links", "baton-link-tls"}, name(manifest))
            self.assertEqual(len(container["volumeMounts"]), 3, name(manifest))
            role = manifest["metadata"]["name"].removeprefix("baton-")
            self.assertIn({"name": "BATON_CONFIG", "value": f"/etc/baton/config/{role}.toml"}, container["env"])

    @unittest.skipUnless(shutil.which("kubectl"), "kubectl is not installed")
    def test_cards_are_given_to_both_pools(self):
        for manifest, _, pod, container in self.pools(with_component("cards")):
            env = {variable["name"]: variable for variable in container["env"]}
            self.assertEqual(env["BATON_ENGINE"]["value"], "cuda", name(manifest))
            # Pages get what the card's memory leaves.
            self.assertNotIn("BATON_KV_MEMORY", env, name(manifest))
            self.assertEqual(container["resources"]["limits"]["nvidia.com/gpu"], 1, name(manifest))
            # The root file system cannot be written.
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            self.assertIn({"name": mounts[env["HOME"]["value"]], "emptyDir": {}}, pod["volumes"], name(manifest))

    def pools(self, rendered):
        pools = [workload for workload in rendered.baton_workloads() if workload[0]["kind"] == "StatefulSet"]
        self.assertEqual(len(pools), 2)
        for manifest, *_ in pools:
            kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        return pools

    def test_compose(self):
        secrets = compose()["secrets"]
        for service, settings in compose()["services"].items():
            tokens = [flag.partition("=")[2] for flag in settings["command"] if flag.startswith("--cluster-token-file=")]
            expected = ["/run/secrets/token"] if service in ("prefill", "decode") else []
            self.assertEqual(tokens, expected, service)
            self.assertEqual(settings.get("secrets", []), ["token"] if expected else [], service)
        self.assertEqual(secrets, {"token": {"file": "./token"}})
        self.assertIn("/deploy/token", (ROOT / ".gitignore").read_text().split())


@unittest.skipUnless(os.environ.get("BATON_BINARY"), "BATON_BINARY names no binary to ask")
class Flags(EachKustomization):
    """Every flag and variable used here is one the binary knows."""

    def check(self, where, command, variables):
        role, *arguments = command
        helped = subprocess.run([os.environ["BATON_BINARY"], role, "--help"], capture_output=True, text=True, timeout=30)
        self.assertEqual(helped.returncode, 0, f"{where}: baton {role} --help: {helped.stderr}")
        known_flags = set(re.findall(r"--[a-z][a-z-]*", helped.stdout))
        known_variables = set(re.findall(r"\[env: (BATON_[A-Z_]+)", helped.stdout))
        self.assertLessEqual({argument.partition("=")[0] for argument in arguments}, known_flags, f"{where}: {role}")
        self.assertLessEqual(set(variables), known_variables, f"{where}: {role}")

    def test_kubernetes(self):
        for rendered in self.each():
            for manifest, _, _, container in rendered.baton_workloads():
                self.check(name(manifest), container["args"], [variable["name"] for variable in container["env"]])

    def test_shared_settings(self):
        (generator,) = kustomization(BASE)["configMapGenerator"]
        variables = [literal.partition("=")[0] for literal in generator["literals"]]
        for role in ("router", "prefill-worker", "decode-worker"):
            self.check("baton-settings", [role], variables)

    def test_compose(self):
        for service, settings in compose()["services"].items():
            if settings["build"]["target"] == "baton":
                self.check(service, settings["command"], settings["environment"])

    def test_default_command_of_the_image(self):
        default = [arguments for instruction, arguments in instructions() if instruction == "CMD"][-1]
        self.check("Dockerfile", yaml.safe_load(default), [])


def compose():
    (document,) = documents(DEPLOY / "compose.yaml")
    return document


class Compose(unittest.TestCase):
    def test_the_parts_of_a_cluster(self):
        self.assertEqual(set(compose()["services"]), {"etcd", "router", "prefill", "decode"})

    def test_everything_is_built_here_and_watched(self):
        stages = {arguments.split()[-1] for instruction, arguments in instructions() if instruction == "FROM"}
        for service, settings in compose()["services"].items():
            self.assertIn(settings["build"]["target"], stages, service)
            context = (DEPLOY / settings["build"]["context"]).resolve()
            self.assertTrue((context / settings["build"]["dockerfile"]).is_file(), service)
            self.assertIn("test", settings["healthcheck"], service)

    def test_workers_advertise_the_name_others_resolve(self):
        for service, settings in compose()["services"].items():
            if service != "etcd":
                self.assertIn(f"--advertise={service}", settings["command"])
                self.assertEqual(settings["environment"]["BATON_ETCD"], "http://etcd:2379")
                self.assertEqual(settings["depends_on"], {"etcd": {"condition": "service_healthy"}})

    def test_health_is_asked_where_it_is_served(self):
        for service, settings in compose()["services"].items():
            if service != "etcd":
                probe, port, path = settings["healthcheck"]["test"][1:]
                flag = "--listen" if service == "router" else "--admin-listen"
                self.assertEqual((probe, path), ("baton-probe", "/readyz"), service)
                self.assertIn(f"{flag}=0.0.0.0:{port}", settings["command"], service)


def instructions():
    """Yields the Dockerfile's instructions as (name, arguments), continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            instruction, _, arguments = line.partition(" ")
            yield instruction, arguments.strip()


class Image(unittest.TestCase):
    def test_what_is_copied_exists(self):
        stages = {arguments.split()[-1] for instruction, arguments in instructions() if instruction == "FROM"}
        for instruction, arguments in instructions():
            if instruction == "COPY":
                *sources, _ = [word for word in arguments.split() if not word.startswith("--")]
                stage = re.search(r"--from=(\S+)", arguments)
                if stage:
                    self.assertIn(stage[1], stages)
                else:
                    for source in sources:
                        self.assertTrue((ROOT / source).exists(), source)

    def test_the_default_image_is_baton_without_root(self):
        last = []
        for instruction, arguments in instructions():
            last = [(instruction, arguments)] if instruction == "FROM" else [*last, (instruction, arguments)]
        self.assertTrue(last[0][1].endswith(" AS baton"))
        settings = dict(last)
        self.assertEqual(settings["USER"], "10001:10001")
        self.assertEqual(yaml.safe_load(settings["ENTRYPOINT"]), ["baton"])
        self.assertIn("HEALTHCHECK", settings)

    def test_pods_run_as_the_user_of_the_image(self):
        for _, _, pod, _ in Rendered(EXAMPLE).workloads():
            self.assertEqual(pod["securityContext"]["runAsUser"], 10001)

    def test_what_the_build_needs_is_not_ignored(self):
        ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
        for needed in ("models", "models/demo", "tests", "proto", "Cargo.lock", ".cargo"):
            self.assertNotIn(needed, ignored)
        self.assertIn("!deploy/docker", ignored)


def declared_metrics():
    """Returns the names of Baton's metrics that the sources hold."""
    sources = (path for crate in ROOT.iterdir() for path in crate.glob("src/**/*.rs"))
    return {name for path in sources for name in re.findall(r'"(baton_[a-z_]+)"', path.read_text())}


def used_metrics(expression):
    """Returns the names of Baton's metrics in a PromQL expression, histograms without what is appended to them."""
    names = re.findall(r"baton_[a-z_]+", expression)
    return {re.sub(r"_seconds_(bucket|sum|count)$", "_seconds", name) for name in names}


class Observability(unittest.TestCase):
    def test_alerts_ask_for_metrics_that_exist(self):
        (rules,) = documents(DEPLOY / "observability/alerts.yaml")
        for group in rules["groups"]:
            for rule in group["rules"]:
                used = used_metrics(rule["expr"])
                self.assertTrue(used, rule["alert"])
                self.assertLessEqual(used, declared_metrics(), rule["alert"])
                self.assertIn(rule["labels"]["severity"], ("page", "warn"))
                self.assertIn("summary", rule["annotations"])

    def test_panels_ask_for_metrics_that_exist(self):
        dashboard = json.loads((DEPLOY / "observability/dashboard.json").read_text())
        places = set()
        for panel in dashboard["panels"]:
            places.add((panel["gridPos"]["x"], panel["gridPos"]["y"]))
            for target in panel["targets"]:
                self.assertLessEqual(used_metrics(target["expr"]), declared_metrics(), panel["title"])
                self.assertEqual(target["expr"].count("("), target["expr"].count(")"), panel["title"])
        self.assertEqual(len(places), len(dashboard["panels"]), "two panels in one place")


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/livez" else 503)
        self.end_headers()

    def log_message(self, *_):
        pass


class Probe(unittest.TestCase):
    def ask(self, port, path):
        probe = DEPLOY / "docker/baton-probe"
        return subprocess.run([probe, str(port), path], capture_output=True, timeout=10).returncode

    def test_only_200_is_healthy(self):
        with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self.assertEqual(self.ask(server.server_port, "/livez"), 0)
            self.assertNotEqual(self.ask(server.server_port, "/readyz"), 0)
            server.shutdown()
        self.assertNotEqual(self.ask(server.server_port, "/livez"), 0)


if __name__ == "__main__":
    unittest.main()
