"""Each rule for inventories names the value and the way out; `faults` says each sentence once."""

import hashlib
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load

rules = load("plugin_utils.inventory")
estate = load("filter.estate")

ROLES = Path(__file__).parents[4] / "roles"
KNOWN = {
    "_common": {"mirror_port": {"type": "int"}, "base_domain": {"type": "str"}},
    "edge": {"edge_port": {"type": "int"}, "edge_burst": {"type": "int"}},
    "llm_serving": {"llm_serving_models": {"type": "list", "elements": "dict"}},
    "mirror": {},
}


def host(name: str = "llm1", groups: tuple[str, ...] = ("serve",), **values: Any) -> dict[str, Any]:
    """Variables of a host as Ansible has them."""
    return {"inventory_hostname": name, "ansible_host": "10.0.0.2", "group_names": list(groups), **values}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("edge_prot", "edge_prot is not a variable of the role edge; did you mean edge_port?"),
        ("llmserving_models", "no role reads llmserving_models; did you mean llm_serving_models?"),
        ("edge_quite_something", "it has edge_burst, edge_port"),
    ],
)
def test_a_misspelt_variable_is_told_with_the_nearest_one(name: str, told: str) -> None:
    (fault,) = rules.unknown_variables([name, "edge_port"], KNOWN)
    assert told in fault


def test_shared_variables_and_an_estates_own_ones_are_accepted() -> None:
    names = ["mirror_port", "base_domain", "llm_serving_models", "ansible_host", "rack", "lab_memory"]
    assert not list(rules.unknown_variables(names, KNOWN))


@pytest.mark.parametrize("value", ["many", [1], {"a": 1}])
def test_a_value_of_a_wrong_type_is_told_with_the_value(value: Any) -> None:
    (fault,) = rules.type_faults({"edge_port": value}, KNOWN)
    assert fault.startswith(f"edge_port is {value!r}: ")


def test_a_misspelt_group_is_told_once_and_a_group_of_the_estates_own_is_accepted() -> None:
    groups = {"all": ["a"], "control": ["a"], "mirror": ["a"], "vlm": ["a"], "rack3": ["a"]}
    assert list(rules.group_faults(groups)) == ["the group vlm belongs to no role; did you mean vllm?"]


def test_a_renamed_group_is_told_with_its_new_name() -> None:
    (fault,) = rules.group_faults({"control": ["a"], "mirror": ["a"], "hsm": ["a"]})
    assert "hsm is called softhsm now" in fault


def test_an_empty_required_group_is_told() -> None:
    (fault,) = rules.group_faults({"control": ["a"]})
    assert "the group mirror is empty" in fault


@pytest.mark.parametrize("control", [["ops1"], ["ops1", "ops2"]])
@pytest.mark.parametrize("mirrors", [["ops1"], ["depot1"]])
def test_the_mirror_is_the_control_node_or_another_host(mirrors: list[str], control: list[str]) -> None:
    groups = {"control": control, "mirror": mirrors}
    assert list(rules.group_faults(groups)) == []
    assert list(rules.placement_faults(host(mirrors[0], ("mirror",)), groups)) == []


def test_several_mirrors_are_refused_with_their_names() -> None:
    groups = {"control": ["ops1"], "mirror": ["ops1", "depot1"]}
    (fault,) = rules.placement_faults(host("depot1", ("mirror",)), groups)
    assert fault == (
        "ops1, depot1 are in mirror, from which all hosts take packages and models: leave one there, the control node or"
        " another host"
    )


def served(serial: int, *folders: str) -> str:
    """What playbooks/mirrored.yml reads on a host that serves this bundle and these folders, whose digest is their name's."""
    lines = [f"serial {serial},", f"{serial:064x}  bundle/current/MANIFEST.json"]
    lines += [f"{hashlib.sha256(name.encode()).hexdigest()}  {name.partition('=')[0]}" for name in folders]
    return "\r\n".join([*lines, ""])


@pytest.mark.parametrize(
    ("control", "mirror", "lacking"),
    [
        (served(7), served(7), []),
        (served(8), served(7), ["bundle 8 (it has 7)"]),
        (served(8), "cd: can't cd to /srv/llmkeep\r\n", ["bundle 8 (it has none)"]),
        (
            served(7, "releases/m/models/../MANIFEST.json=2", "images/ab/image.json"),
            served(7, "releases/m/models/../MANIFEST.json=1"),
            ["releases/m", "images/ab"],
        ),
        (served(7), served(7, "releases/m/models/../MANIFEST.json"), []),
    ],
)
def test_a_mirror_is_behind_by_what_the_control_node_has_and_it_has_not(
    control: str, mirror: str, lacking: list[str]
) -> None:
    assert estate.not_mirrored(control, mirror) == lacking


def test_a_tag_that_selects_nothing_is_told_with_the_nearest_role() -> None:
    assert list(rules.tag_faults(["llm-serving", "edge", "always"], KNOWN)) == [
        "the tag llm-serving selects nothing; did you mean llm_serving?"
    ]


@pytest.mark.parametrize(
    "limit", ["llm1", "serve:!llm1", "llm*,localhost", "~ll.[0-9]", "serve[0]", "@retry", ""]
)
def test_a_limit_of_hosts_groups_and_patterns_is_accepted(limit: str) -> None:
    assert not list(rules.limit_faults(limit, ["all", "serve", "llm1", "localhost"]))


@pytest.mark.parametrize("limit", ["lm1", "llm1,lm1", "serve:!lm1"])
def test_a_limit_that_names_nothing_is_told_with_the_nearest_name(limit: str) -> None:
    assert list(rules.limit_faults(limit, ["all", "serve", "llm1"])) == [
        "the limit lm1 is not a host or group; did you mean llm1?"
    ]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (host(groups=("rack3",)), "it is in rack3, and in none of the estate's groups"),
        (host(groups=()), "it is in no group"),
        (host(ansible_host="llm1.example.org"), "its address is 'llm1.example.org'"),
        (host(groups=("storage",)), "set hsm_module"),
        (host(groups=("vllm",)), "add it to serve or engines too"),
        (host(groups=("edge",)), "an edge reaches its gateway over a UNIX socket: add it to serve too"),
        (host(groups=("chat", "serve")), "the edge serves the chat page: add it to edge too"),
        (host(groups=("keepalived", "serve")), "the addresses move between edges: add it to edge too"),
        (host(groups=("serve", "kubernetes")), "add it to control too"),
        (host(groups=("logs",)), "no host is in search: put one in it"),
        (host(groups=("logstash",)), "no host is in search: put one in it"),
    ],
)
def test_a_host_that_cannot_be_placed_is_told(values: dict[str, Any], told: str) -> None:
    (fault,) = rules.placement_faults(values, {"storage": ["llm1"]})
    assert told in fault


@pytest.mark.parametrize(
    ("group", "told"),
    [
        ("redis", "llm1, llm2 are in redis, whose one Redis all gateways share"),
        ("search", "llm1, llm2 are in search, whose role makes one node: leave one there"),
        ("logstash", "llm1, llm2 are in logstash, to which all hosts ship their logs: leave one there"),
    ],
)
def test_two_hosts_in_a_group_for_one_are_told(group: str, told: str) -> None:
    groups = {"search": ["llm1"], group: ["llm1", "llm2"]}
    (fault,) = rules.placement_faults(host(groups=("serve", group)), groups)
    assert told in fault


def test_a_storage_host_with_an_hsm_is_accepted() -> None:
    assert not list(rules.placement_faults(host(groups=("storage",)), {"softhsm": ["ops1"]}))
    assert not list(rules.placement_faults(host(groups=("storage",), hsm_module="/usr/lib/vendor.so"), {}))


def test_a_node_of_slurms_needs_what_it_starts_and_one_controller() -> None:
    node, one = ("slurm_node", "train"), {"slurm_controller": ["ops1"]}
    assert not list(rules.placement_faults(host(groups=node), one))
    (fault,) = rules.placement_faults(host(groups=("slurm_node",)), one)
    assert "not in train" in fault
    (fault,) = rules.placement_faults(host(groups=node), {})
    assert "no host in slurm_controller" in fault
    (fault,) = rules.placement_faults(host(groups=node), {"slurm_controller": ["ops1", "ops2"]})
    assert "ops1, ops2 in slurm_controller" in fault


EDGES = {"keepalived": ["llm1", "llm2"]}
EDGE_ADDRESSES = {"llm1.estate.internal": "10.0.0.1", "llm2.estate.internal": "10.0.0.2"}


def edge_with(**changed: Any) -> dict[str, Any]:
    """One of two edges that share an address."""
    return host(
        groups=("serve", "edge", "keepalived"),
        **{"keepalived_addresses": ["10.0.0.9"], "keepalived_name": "ask.estate.internal"} | changed,
    )


def test_two_edges_with_one_address_and_a_name_are_accepted() -> None:
    assert not list(rules.keepalived_faults(edge_with(), EDGES, EDGE_ADDRESSES))
    both = edge_with(keepalived_addresses=["10.0.0.9", "fd00::9"], base_ipv6=True, keepalived_name="")
    assert not list(rules.keepalived_faults(both, EDGES, EDGE_ADDRESSES))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"keepalived_addresses": []}, "keepalived_addresses is empty: name the address that clients ask"),
        (
            {"keepalived_addresses": ["10.0.0.9/24"]},
            "has '10.0.0.9/24': write an IP address, without a prefix",
        ),
        (
            {"keepalived_addresses": ["10.0.0.2"]},
            "has 10.0.0.2, which is llm2.estate.internal's: choose an unused",
        ),
        ({"keepalived_addresses": ["fd00::9"]}, "has fd00::9, but IPv6 is off: set base_ipv6 to true"),
        (
            {"keepalived_name": "ask.example.org"},
            "is ask.example.org, which the estate's authority does not certify",
        ),
        ({"keepalived_name": "llm2.estate.internal"}, "is llm2.estate.internal, which is a host's"),
    ],
)
def test_an_address_that_cannot_move_between_edges_is_told(changed: dict[str, Any], told: str) -> None:
    (fault,) = rules.keepalived_faults(edge_with(**changed), EDGES, EDGE_ADDRESSES)
    assert told in fault


def test_one_edge_alone_is_told() -> None:
    (fault,) = rules.keepalived_faults(edge_with(), {"keepalived": ["llm1"]}, EDGE_ADDRESSES)
    assert "it is alone in keepalived" in fault


def test_an_address_in_no_network_of_a_host_is_found() -> None:
    networks = ["10.0.0.1/24", "fd00::1/64"]
    assert estate.outside(["10.0.0.9", "10.0.1.9", "fd00::9", "fd00:1::9"], networks) == [
        "10.0.1.9",
        "fd00:1::9",
    ]


def volume(**changed: Any) -> dict[str, Any]:
    """A volume that holds everything below /srv/llmkeep."""
    units = ["llm-engine@.service", "vllm@.service"]
    return {"name": "data", "serial": "S1", "size": "2T", "mount": "/srv/llmkeep", "units": units} | changed


@pytest.mark.parametrize(
    ("volumes", "told"),
    [
        ([volume(units=["llm-engine@.service"])], "add vllm@.service to its units"),
        ([volume(size="much")], "the size of data is 'much'"),
        ([volume(), volume(mount="/x", name="b")], "use the serial S1 more than once"),
    ],
)
def test_a_volume_that_cannot_be_made_or_that_a_service_would_not_wait_for_is_told(
    volumes: list[dict[str, Any]], told: str
) -> None:
    (fault,) = rules.volume_faults(
        host(groups=("serve", "vllm", "storage"), luks_volumes=volumes), rules.specifications(ROLES)
    )
    assert told in fault


@pytest.mark.parametrize(
    ("size", "data", "told"),
    [
        ("256G", 100, None),
        (
            "200G",
            100,
            "has 200G, and base_journal_max and elasticsearch_data_gb and elasticsearch_snapshot_gb come to 205824 MiB",
        ),
        ("256G", 150, "come to 257024 MiB: that may be 85% of it"),
    ],
)
def test_budgets_that_come_to_more_than_their_volume_are_told(size: str, data: int, told: str | None) -> None:
    volumes = [volume(mount="/var", size=size, units=["elasticsearch.service"])]
    values = host(groups=("search", "storage"), luks_volumes=volumes, elasticsearch_data_gb=data)
    faults = list(rules.volume_faults(values, rules.specifications(ROLES)))
    assert faults == [] if told is None else told in faults[0]


def test_a_budget_that_is_no_size_is_told() -> None:
    values = host(
        groups=("storage",), luks_volumes=[volume(mount="/var/log", units=[])], base_journal_max="much"
    )
    (fault,) = rules.volume_faults(values, rules.specifications(ROLES))
    assert fault == "base_journal_max is 'much', which is not a size: write one such as 1G"


@pytest.mark.parametrize(
    ("groups", "values", "told"),
    [
        (("gpu",), {"gpu_set": "nvidia-510"}, "gpu_set is nvidia-510; take one of nvidia-580-open, "),
        (
            ("gpu",),
            {"gpu_set": "debian-550", "gpu_sets": [{"name": "own"}]},
            "gpu_set is debian-550; take one of own",
        ),
        (("gpu",), {"gpu_signing": "hsm"}, "the host is not in storage"),
        (("gpu", "storage"), {"gpu_set": "debian-550", "gpu_signing": "hsm"}, None),
        (("gpu",), {}, None),
        (("gpu",), {"gpu_set": "provided", "gpu_sets": [{"name": "own"}]}, None),
        (("gpu", "serve"), {}, "gpu_health_expect is not set: write how many GPUs the host has"),
        (("gpu", "train"), {"gpu_health_expect": {"count": 8}}, None),
        (("serve",), {"gpu_set": "nvidia-510"}, None),
        (("gpu",), {"gpu_sets": [{"name": "own"}]}, "gpu_set is nvidia-580-open; take one of own, provided"),
    ],
)
def test_a_driver_set_that_does_not_exist_or_whose_key_is_out_of_reach_is_told(
    groups: tuple[str, ...], values: dict[str, Any], told: str | None
) -> None:
    faults = list(rules.gpu_faults(host(groups=groups, **values)))
    assert len(faults) == (told is not None)
    assert told is None or told in faults[0]


def driver_set(name: str, driver: str, below: str = "13.0") -> dict[str, Any]:
    """The part of an entry of gpu_sets that tells whether it runs the lock's CUDA."""
    return {"name": name, "driver": driver, "cuda": {"from": "12.0", "below": below}}


@pytest.mark.parametrize(
    ("groups", "values", "told"),
    [
        (("vllm",), {"gpu_set": "debian-550"}, "but the bundle's vllm has CUDA 13.0, "),
        (
            ("serve",),
            {"gpu_set": "debian-tesla-535", "llm_serving_accelerator": "cuda"},
            "gpu_set is debian-tesla-535 (driver 535.274.02, CUDA from 12.0 and below 13.0), but the bundle's serving-cuda has ",
        ),
        (
            ("train",),
            {"gpu_set": "debian-550", "llm_training_gpus": True},
            "but the bundle's training-cuda has CUDA 13.0, ",
        ),
        (
            ("vllm",),
            {
                "gpu_set": "own",
                "gpu_sets": [driver_set("own", "570.1"), driver_set("next", "1000.1", "14.0")],
            },
            "needs NVIDIA's driver 580 or later: take next, or build a bundle of profile gpu-debian, ",
        ),
        (
            ("vllm",),
            {"gpu_set": "own", "gpu_sets": [driver_set("own", "570.1")]},
            "or later: build a bundle of profile gpu-debian, whose wheels are for CUDA 12, or install such a driver yourself",
        ),
        (
            ("vllm",),
            {"gpu_set": "own", "gpu_sets": [driver_set("own", "550.1", "14.0")]},
            "the set own (driver 550.1, CUDA from 12.0 and below 14.0) is mixed: CUDA 13 needs driver 580 or later",
        ),
        (("vllm",), {}, None),
        (("vllm",), {"gpu_set": "provided"}, None),
        (("serve",), {"gpu_set": "debian-550"}, None),
        (("train",), {"gpu_set": "debian-550", "llm_training_gpus": False}, None),
    ],
)
def test_a_driver_set_too_old_for_the_locks_cuda_is_told_with_the_sets_that_fit(
    groups: tuple[str, ...], values: dict[str, Any], told: str | None
) -> None:
    faults = list(rules.gpu_faults(host(groups=("gpu", *groups), gpu_health_expect={"count": 8}, **values)))
    assert len(faults) == (told is not None)
    assert told is None or told in faults[0]


@pytest.mark.parametrize(
    ("groups", "values", "told"),
    [
        (
            ("slurm_node", "train"),
            {"llm_training_jobs": [{"name": "sql"}]},
            "llm_training_jobs has sql, which systemd",
        ),
        (("slurm_node", "train"), {}, None),
        (("prometheus",), {}, "set prometheus_webhook or prometheus_mail"),
        (("prometheus",), {"prometheus_mail": {"to": "a@example.org"}}, None),
        (
            ("prometheus",),
            {"prometheus_webhook": "https://relay/", "prometheus_hosts": ["llm1", "gone"]},
            "prometheus_hosts names gone",
        ),
        (("softhsm",), {"softhsm_clients": ["gone"]}, "softhsm_clients names gone"),
        (
            ("edge", "serve"),
            {"edge_key_source": "hsm", "edge_client_ca_file": "/ca.pem"},
            "edge_client_ca_file is /ca.pem",
        ),
        (("edge", "serve", "mirror"), {"edge_key_source": "hsm"}, "it is in mirror"),
        (("edge", "serve", "control"), {"edge_key_source": "hsm"}, "it is in control"),
        (("edge", "serve", "mirror"), {"edge_client_ca_file": "/ca.pem"}, None),
        (("serve", "mirror"), {"edge_key_source": "hsm"}, None),
    ],
)
def test_what_a_roles_preflight_would_refuse_by_the_inventory_alone_is_told(
    groups: tuple[str, ...], values: dict[str, Any], told: str | None
) -> None:
    faults = list(rules.preflight_faults(host(groups=groups, **values), {"all": ["llm1"]}))
    assert len(faults) == (told is not None)
    assert told is None or told in faults[0]


def test_a_version_beside_the_driver_set_is_no_variable() -> None:
    (fault,) = rules.unknown_variables(["gpu_driver_version"], rules.specifications(ROLES))
    assert fault.startswith("gpu_driver_version is not a variable of the role gpu; ")


def test_equal_faults_of_several_hosts_are_one_line_with_their_names() -> None:
    shared = {"edge_prot": 1}
    hosts = {name: host(name, ("control", "mirror", "serve"), **shared) for name in ("llm1", "llm2")}
    groups = {"all": list(hosts), "control": ["llm1"], "mirror": ["llm1"], "serve": list(hosts)}
    (fault,) = rules.faults(groups, hosts, KNOWN)
    assert fault.startswith("llm1, llm2: edge_prot is not a variable")


def test_what_a_role_would_refuse_later_is_told_now() -> None:
    models = [{"name": "Not A Name", "driver": "echo"}]
    serve = host(groups=("control", "mirror", "serve"), llm_serving_models=models)
    (fault,) = rules.faults(
        {"all": ["llm1"], "control": ["llm1"], "mirror": ["llm1"]}, {"llm1": serve}, KNOWN
    )
    assert fault.startswith("llm1: llm_serving_models: Not A Name: a name has small letters")


def test_every_roles_specification_is_read() -> None:
    found = rules.specifications(ROLES)
    assert "base_domain" in found["_common"]
    assert "pki_extra_names" in found["pki"]


def test_each_group_of_the_estate_has_a_play() -> None:
    plays = "".join(path.read_text() for path in (ROLES.parent / "playbooks").glob("*.yml"))
    assert [
        group
        for group in rules.GROUPS
        if not re.search(rf"^  hosts: (>-\n)?.*\b{group}\b", plays, re.MULTILINE)
    ] == []


@pytest.mark.parametrize(
    ("source", "hosts"), [("10.1.2.3", ["ops1"]), ("10.0.0.1", []), ("10.9.9.9", ["ops1", "llm1"]), ("", [])]
)
def test_hosts_that_would_cut_a_runs_own_connection_are_named(source: str, hosts: list[str]) -> None:
    hostvars = {
        "ops1": {"ansible_host": "10.0.0.1"},
        "llm1": {"ansible_host": "10.0.0.2", "base_ssh_from": ["10.1.0.0/16"]},
    }
    groups = {"all": ["ops1", "llm1"], "control": ["ops1"]}
    assert estate.locked_out(hostvars, groups, source) == hosts


def test_an_operator_who_would_be_refused_is_told_before_any_host_is_contacted() -> None:
    known = rules.specifications(ROLES)
    declared = host(
        groups=("operators",),
        operators_accounts=[{"name": "root", "keys": ["ssh-rsa AAAA"], "until": date(2020, 1, 31)}],
    )
    assert not list(rules.type_faults({"operators_accounts": declared["operators_accounts"]}, known))
    refused = [
        fault for fault in rules.preflight_faults(declared, {}) if fault.startswith("operators_accounts: ")
    ]
    assert [fault.split(": ", 1)[1].split(" ")[0] for fault in refused] == ["root", "root:", "root"]
