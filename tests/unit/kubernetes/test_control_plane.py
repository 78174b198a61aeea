"""The cluster that other tests here stand on."""

import http.client
import ssl

import pytest
from control_plane import ControlPlane


def connected(cluster: ControlPlane, context: ssl.SSLContext) -> int:
    link = http.client.HTTPSConnection(cluster.address, cluster.port, context=context, timeout=30)
    link.request("GET", "/api/v1/namespaces")
    return link.getresponse().status


def test_a_deployment_gets_its_pods(cluster: ControlPlane) -> None:
    cluster.kubectl("create", "deployment", "web", "--image=registry.local/web:1", "--replicas=2")
    cluster.kubectl("wait", "--for=create", "pod", "--selector=app=web", "--timeout=60s")


def test_a_user_without_rights_is_forbidden(cluster: ControlPlane) -> None:
    visitor = cluster.identity("visitor", ["visitors"])
    with pytest.raises(AssertionError, match=r"Forbidden.*visitor"):
        cluster.kubectl("get", "pods", kubeconfig=visitor)


def test_a_client_without_a_certificate_is_unauthorized(cluster: ControlPlane) -> None:
    assert connected(cluster, ssl.create_default_context(cafile=cluster.keys.ca)) == 401


def test_older_tls_than_1_3_is_refused(cluster: ControlPlane) -> None:
    context = ssl.create_default_context(cafile=cluster.keys.ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
        connected(cluster, context)
