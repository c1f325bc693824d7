# SPDX-License-Identifier: Apache-2.0
"""The programs of a cluster with one node, started and configured by hand.

etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kube-proxy, containerd
and kubelet are the real ones.  Names are answered by names.py;
pods get their addresses from the bridge of containernetworking-plugins, without NetworkPolicy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pagecache_bpf.placement.kubernetes_api import KubernetesApi
from tests.cluster import images
from tests.cluster.names import NameServer
from tests.cluster.private import BUILT, CGROUP, STATE

NODE = "node1"
#: Of the node, on its lo; of the services; of the pods.
ADDRESS, SERVICES, PODS = "10.88.0.1", "10.87.0.0/24", "10.89.0.0/16"
API = f"https://{ADDRESS}:6443"
ADMIN = "system:masters"
#: By role: user and groups.
USERS = {
    "admin": ("admin", ADMIN),
    "kubelet": (f"system:node:{NODE}", "system:nodes"),
    "scheduler": ("system:kube-scheduler", ""),
    "controllers": ("system:kube-controller-manager", ""),
    "proxy": ("system:kube-proxy", ""),
}
#: What docs/cluster.md says, as far as this release has it: v1beta1 here is v1 since 1.25.
_CONFIGURATION = "kubescheduler.config.k8s.io/v1beta1"


class Machine:
    """A cluster; start() and stop()."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.names: NameServer | None = None
        self.api = KubernetesApi(API, STATE / "admin.token", STATE / "tls.crt")

    def start(self) -> None:
        """Start all of it, and wait until the node is ready."""
        _done("ip", "address", "replace", f"{ADDRESS}/32", "dev", "lo")
        # Something has to be the way to everywhere, or services have no way out.
        _done("ip", "link", "add", "outside", "type", "veth", "peer", "name", "nowhere")
        _done("ip", "link", "set", "outside", "up")
        _done("ip", "link", "set", "nowhere", "up")
        _done("ip", "route", "add", "default", "dev", "outside", "src", ADDRESS)
        self._certificates()
        self._start_control_plane()
        self._start_node()

    def stop(self) -> None:
        """Stop what was started, the node first; private.end_all() does the rest."""
        if self.names:
            self.names.close()
        for name in reversed(list(self.running)):
            self.end(name)

    def end(self, name: str) -> None:
        """Stop one program."""
        process = self.running.pop(name)
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kubectl(self, *words: str, given: str | None = None, check: bool = True) -> str:
        """Run kubectl as the administrator, and return what it printed."""
        command = [str(BUILT / "bin" / "kubectl"), "--kubeconfig", str(STATE / "admin.conf")]
        done = subprocess.run(
            [*command, *words], input=given, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 or not check, f"kubectl {words}\n{done.stdout}{done.stderr}"
        return done.stdout

    def run(self, name: str, *command: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a program; its output goes to NAME.log."""
        program = command[0]
        for place in (BUILT / "bin", BUILT / "packages/usr/bin"):
            if (place / program).exists():
                program = str(place / program)
        path = f"{BUILT / 'packages/usr/bin'}:{BUILT / 'packages/usr/sbin'}:{os.environ['PATH']}"
        with (STATE / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [program, *command[1:]],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=STATE,
                env={**os.environ, "PATH": path, **(environment or {})},
            )

    def wait(self, what: str, true: Callable[[], Any], seconds: float = 120) -> Any:
        """Wait until a function returns something true; a program that ended is told."""
        end, failed = time.monotonic() + seconds, None
        while time.monotonic() < end:
            for name, process in self.running.items():
                if process.poll() is not None:
                    log = (STATE / f"{name}.log").read_text(errors="replace")[-3000:]
                    raise AssertionError(f"{name} ended with {process.returncode}: {log}")
            try:
                if found := true():
                    return found
            except (AssertionError, OSError, subprocess.SubprocessError) as error:
                failed = error
            time.sleep(0.25)
        raise AssertionError(f"not within {seconds} s: {what}; {failed or ''}")

    def get(self, kind: str, name: str = "", namespace: str = "default") -> Any:
        """Get an object, or the list of all, from the API server."""
        words = ["get", kind, *([name] if name else []), "-n", namespace, "-o", "json"]
        return json.loads(self.kubectl(*words))

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Create or change objects."""
        items = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "-f", "-", given=json.dumps(items))

    def _certificates(self) -> None:
        names = f"IP:{ADDRESS},IP:127.0.0.1,IP:10.87.0.1,DNS:kubernetes.default.svc,DNS:{NODE}"
        _done(
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=cluster-of-a-test", "-addext", f"subjectAltName={names}"),
            *("-keyout", str(STATE / "tls.key"), "-out", str(STATE / "tls.crt")),
        )
        _done("openssl", "genrsa", "-out", str(STATE / "accounts.key"), "2048")
        lines = []
        for role, (user, groups) in USERS.items():
            token = os.urandom(16).hex()
            (STATE / f"{role}.token").write_text(token)
            lines.append(f'{token},{user},{role},"{groups}"\n')
            (STATE / f"{role}.conf").write_text(json.dumps(_kubeconfig(token)))
        (STATE / "tokens.csv").write_text("".join(lines))

    def _start_control_plane(self) -> None:
        (STATE / "audit.yaml").write_text(json.dumps(_AUDIT))
        self.run(
            *("etcd", "etcd", f"--data-dir={STATE}/etcd"),
            *(
                "--listen-client-urls=http://127.0.0.1:2379",
                "--listen-peer-urls=http://127.0.0.1:2380",
            ),
            *("--advertise-client-urls=http://127.0.0.1:2379", "--logger=zap"),
        )
        self.run(
            *("apiserver", "kube-apiserver", "--etcd-servers=http://127.0.0.1:2379"),
            *(f"--advertise-address={ADDRESS}", "--secure-port=6443"),
            "--kubelet-preferred-address-types=InternalIP",
            *(f"--service-cluster-ip-range={SERVICES}", "--allow-privileged=true"),
            *(f"--tls-cert-file={STATE}/tls.crt", f"--tls-private-key-file={STATE}/tls.key"),
            *(f"--token-auth-file={STATE}/tokens.csv", "--authorization-mode=Node,RBAC"),
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={STATE}/accounts.key",
            f"--service-account-key-file={STATE}/accounts.key",
            *(f"--audit-policy-file={STATE}/audit.yaml", f"--audit-log-path={STATE}/audit.log"),
        )
        self.wait("the API server is ready", lambda: self.kubectl("get", "--raw", "/readyz"))
        self.run(
            *("controllers", "kube-controller-manager", f"--kubeconfig={STATE}/controllers.conf"),
            *("--leader-elect=false", "--use-service-account-credentials=true"),
            f"--service-account-private-key-file={STATE}/accounts.key",
            f"--root-ca-file={STATE}/tls.crt",
        )
        self.schedule("scheduler", "default-scheduler")

    def schedule(self, name: str, profile: str, **changes: Any) -> None:
        """Start a scheduler, with what changes in its configuration."""
        second = name != "scheduler"
        serves = f"127.0.0.1:{10351 if second else 10251}"
        config = {
            "apiVersion": _CONFIGURATION,
            "kind": "KubeSchedulerConfiguration",
            "clientConnection": {"kubeconfig": f"{STATE}/scheduler.conf"},
            "leaderElection": {"leaderElect": False},
            "profiles": [{"schedulerName": profile}],
            "healthzBindAddress": serves,
            "metricsBindAddress": serves,
            **changes,
        }
        (STATE / f"{name}.yaml").write_text(json.dumps(config))
        words = [f"--config={STATE}/{name}.yaml", f"--secure-port={0 if second else 10259}"]
        self.run(name, "kube-scheduler", *words)

    def _start_node(self) -> None:
        for name in ("containerd", "kubelet", "cni"):
            (STATE / name).mkdir()
        (STATE / "cni" / "bridge.conflist").write_text(json.dumps(_NETWORK))
        (STATE / "containerd.toml").write_text(_containerd())
        self.run("containerd", "containerd", "--config", f"{STATE}/containerd.toml")
        self.wait("containerd answers", lambda: not ctr("version"))
        self.import_image(images.pause(STATE))
        self.names = NameServer(ADDRESS, self.api)
        (STATE / "resolv.conf").write_text(f"nameserver {ADDRESS}\n")
        (STATE / "kubelet.yaml").write_text(json.dumps(_KUBELET))
        self.run(
            *("kubelet", "kubelet", f"--config={STATE}/kubelet.yaml"),
            *(f"--kubeconfig={STATE}/kubelet.conf", f"--root-dir={STATE}/kubelet"),
            *("--container-runtime=remote", f"--hostname-override={NODE}", f"--node-ip={ADDRESS}"),
            f"--container-runtime-endpoint=unix://{SOCKET}",
            f"--image-service-endpoint=unix://{SOCKET}",
        )
        self.run(
            *("proxy", "kube-proxy", f"--kubeconfig={STATE}/proxy.conf", "--proxy-mode=iptables"),
            *(f"--cluster-cidr={PODS}", f"--hostname-override={NODE}"),
            *("--conntrack-max-per-core=0", "--conntrack-min=0"),
            *("--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s"),
        )
        self.wait("the node is ready", lambda: ready(self.get("node", NODE)))

    def import_image(self, archive: Path) -> None:
        """Load an image into the node, as docs/kubernetes.md says."""
        assert not ctr("-n", "k8s.io", "images", "import", str(archive))


SOCKET = "/run/containerd/containerd.sock"


def ctr(*words: str) -> str:
    """Run containerd's own command; returns what went wrong, empty: nothing."""
    command = [str(BUILT / "packages/usr/bin/ctr"), "--address", SOCKET, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stderr or "failed" if done.returncode else ""


def ready(thing: Mapping[str, Any]) -> bool:
    """Tell whether a Node or a Pod says that it is ready."""
    conditions = thing["status"].get("conditions") or []
    return any(
        condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions
    )


def _kubeconfig(token: str) -> dict[str, Any]:
    cluster = {"server": API, "certificate-authority": f"{STATE}/tls.crt"}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }


#: Who patches which node, with the time: test_thousand_nodes.py counts them.
_AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {
            "level": "Metadata",
            "verbs": ["patch"],
            "users": ["admin"],
            "resources": [{"group": "", "resources": ["nodes"]}],
        },
        {"level": "None"},
    ],
}

_NETWORK = {
    "cniVersion": "0.4.0",
    "name": "pods",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "pods0",
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": f"{STATE}/cni-addresses",
                "ranges": [[{"subnet": PODS}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
    ],
}

_KUBELET = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
    "authorization": {"mode": "AlwaysAllow"},
    "cgroupDriver": "cgroupfs",
    "cgroupRoot": f"/{CGROUP}",
    "clusterDNS": [ADDRESS],
    "clusterDomain": "cluster.local",
    "resolvConf": f"{STATE}/resolv.conf",
    "failSwapOn": False,
    "protectKernelDefaults": False,
    "oomScoreAdj": 0,
    "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%"},
    "imageGCHighThresholdPercent": 100,
    "tlsCertFile": f"{STATE}/tls.crt",
    "tlsPrivateKeyFile": f"{STATE}/tls.key",
}


def _containerd() -> str:
    runc = shutil.which("runc") or BUILT / "packages/usr/sbin/runc"
    return f"""
version = 2
root = "{STATE}/containerd"
state = "/run/containerd"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{images.PAUSE}"
restrict_oom_score_adj = true
disable_apparmor = true
enable_selinux = false
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{BUILT.resolve()}/packages/usr/lib/cni"
conf_dir = "{STATE}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "{runc}"
SystemdCgroup = false
"""


def _done(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)
