"""Module cluster_manifests: kubeconfigs, image records and overlays that are refused, and what the API server refuses."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster_overlay import DIGESTS, IMAGE
from deployed_cluster import Estate, stateful


def altered(estate: Estate, alter: Callable[[Any], object]) -> Path:
    content = json.loads(estate.cluster.kubeconfig.read_text())
    alter(content)
    estate.kubeconfig = estate.folder / "kubeconfig"
    estate.kubeconfig.touch(0o600)
    estate.kubeconfig.write_text(json.dumps(content))
    return estate.kubeconfig


def test_a_kubeconfig_that_others_read_is_refused(estate: Estate) -> None:
    altered(estate, lambda _: None).chmod(0o640)
    assert "has mode 0640 of uid 0, and is for root alone" in estate.refused()


def test_a_kubeconfig_of_another_user_is_refused(estate: Estate) -> None:
    os.chown(altered(estate, lambda _: None), 65534, 65534)
    assert "has mode 0600 of uid 65534, and is for root alone" in estate.refused()


def test_a_kubeconfig_in_a_folder_that_others_change_is_refused(estate: Estate) -> None:
    path = altered(estate, lambda _: None)
    (estate.folder / "open").mkdir()
    estate.kubeconfig = path.rename(estate.folder / "open" / "kubeconfig")
    (estate.folder / "open").chmod(0o777)
    assert "cannot be read" in estate.refused()


def test_a_kubeconfig_that_verifies_no_server_is_refused(estate: Estate) -> None:
    altered(
        estate, lambda content: content["clusters"][0]["cluster"].update({"insecure-skip-tls-verify": True})
    )
    assert "insecure-skip-tls-verify" in estate.refused()


def test_a_kubeconfig_without_tls_is_refused(estate: Estate) -> None:
    altered(
        estate, lambda content: content["clusters"][0]["cluster"].update({"server": "http://127.0.0.1:1"})
    )
    assert "not reached by TLS" in estate.refused()


def test_a_file_that_is_no_kubeconfig_is_refused_without_its_content(estate: Estate) -> None:
    altered(estate, lambda content: content.update({"current-context": "secret"}))
    said = estate.refused()
    assert "is not a kubeconfig with a current context" in said
    assert "secret" not in said


def test_a_kubeconfig_of_another_authority_is_refused(estate: Estate) -> None:
    altered(
        estate,
        lambda content: content["clusters"][0]["cluster"].pop("certificate-authority-data"),
    )
    assert "not one of the kubeconfig's authority" in estate.refused()


def test_a_cluster_out_of_reach_is_refused(estate: Estate) -> None:
    altered(
        estate, lambda content: content["clusters"][0]["cluster"].update({"server": "https://127.0.0.1:1"})
    )
    assert "base_open_out" in estate.refused()


def test_a_user_without_rights_is_told_which_are_missing(estate: Estate) -> None:
    estate.kubeconfig = estate.cluster.identity("visitor", ["visitors"])
    said = estate.refused()
    assert f"patch deployments.apps in {estate.namespace}" in said
    assert "secrets" not in said
    assert "exec" not in said
    assert estate.untouched()


def test_a_user_who_may_not_ask_for_a_records_heads_is_told(estate: Estate) -> None:
    estate.pod["containers"].append({**estate.pod["containers"][0], "name": "audit"})
    stateful(estate)
    estate.kubeconfig = estate.cluster.identity("visitor", ["visitors"])
    assert f"create pods/exec in {estate.namespace}" in estate.refused()
    assert estate.untouched()


def test_an_image_record_that_was_changed_is_refused(estate: Estate) -> None:
    record = estate.folder / "image.json"
    record.write_text(record.read_text().replace(DIGESTS[0], DIGESTS[1]))
    assert "has no valid signature" in estate.refused()
    assert estate.untouched()


def test_another_digest_than_the_signed_one_is_refused(estate: Estate) -> None:
    estate.pod["containers"][0]["image"] = f"registry.example.org/llmkeep@{DIGESTS[1]}"
    assert f"the signed record names {IMAGE}@{DIGESTS[0]}" in estate.refused()
    assert estate.untouched()


def test_a_secret_in_a_manifest_is_refused(estate: Estate) -> None:
    estate.objects["Secret"] = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "serving", "namespace": estate.namespace},
        "stringData": {"key": "value-of-the-secret"},
    }
    said = estate.refused()
    assert "is declared in a manifest" in said
    assert "value-of-the-secret" not in said


def test_an_overlay_that_others_change_is_refused(estate: Estate) -> None:
    (estate.folder / "overlay").mkdir()
    (estate.folder / "overlay").chmod(0o777)
    assert "users other than root can change its content" in estate.refused()


def test_an_object_without_a_namespace_is_refused(estate: Estate) -> None:
    estate.objects["PodDisruptionBudget"]["metadata"] = {"name": "serving"}
    assert "PodDisruptionBudget serving has no namespace" in estate.refused()
    assert estate.untouched()


def test_a_webhook_that_is_down_is_named_and_nothing_is_left(estate: Estate) -> None:
    hook = {
        "name": "guard.example.org",
        "clientConfig": {"url": "https://127.0.0.1:1/"},
        "rules": [
            {"apiGroups": ["policy"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["*"]}
        ],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": estate.namespace}},
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    configuration = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": estate.namespace},
        "webhooks": [hook],
    }
    estate.cluster.kubectl("create", "-f", "-", stdin=json.dumps(configuration))
    try:
        assert 'failed calling webhook "guard.example.org"' in estate.refused()
    finally:
        estate.cluster.kubectl("delete", "validatingwebhookconfiguration", estate.namespace)
    assert estate.untouched()
