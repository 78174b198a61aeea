"""The operator's verbs that run Ansible: `llmkeep site | verify | run`.

Exit codes: 0 done, and all checks passed; 1 a host failed, a check failed, or the run was refused; 130 interrupted.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from llmkeep import source_tree
from llmkeep.playbooks import RunError, inventory_path, memory, play
from llmkeep.record import runs as record
from llmkeep.record import verification
from llmkeep.record.runs import recorded

ESTATE_INVENTORY = Path("/etc/llmkeep/inventory")  # as in ansible.cfg


def _words(arguments: argparse.Namespace) -> list[str]:
    """The operator's options as arguments of ansible-playbook."""
    words = [word for name in ("limit", "tags", "skip_tags") if getattr(arguments, name) for word in
             (f"--{name.replace('_', '-')}", getattr(arguments, name))]  # fmt: skip
    words += [word for value in arguments.extra_vars for word in ("--extra-vars", value)]
    words += ["--check"] * arguments.check + ["--diff"] * arguments.diff + ["-v"] * arguments.verbose
    return words + list(arguments.ansible)


def _playbook(name: str, root: Path) -> Path:
    """Path of a playbook, relative to the working directory or else to the tree."""
    for place in (Path.cwd() / name, root / name):
        if place.is_file():
            return place.resolve()
    known = ", ".join(sorted(f"playbooks/{path.name}" for path in (root / "playbooks").glob("*.yml")))
    raise RunError(
        f"there is no playbook {name!r}, neither here nor in {root}: use site.yml or one of {known}"
    )


def _run(arguments: argparse.Namespace, words: list[str] | None = None) -> int:
    """Run one playbook with these arguments for Ansible, by default those of the operator's options."""
    root = source_tree.located()
    # Of a verb it is the tree's own, wherever the operator stands.
    playbook = _playbook(arguments.playbook, root) if arguments.playbook else (root / "site.yml").resolve()
    inventories = [inventory_path(place, root) for place in arguments.inventory]
    # Of the bundle that the run begins with: another one may be installed meanwhile.
    serial = int(record.SERIAL.read_text()) if record.SERIAL.exists() else None
    with recorded(root, playbook, inventories, arguments) as outcome:
        code, results = play(playbook, inventories, _words(arguments) if words is None else words)
        outcome.code, outcome.hosts, outcome.accepted = code, results.hosts, results.accepted
    if code == 0 and playbook == (root / "site.yml").resolve() and serial is not None:
        record.note(record.APPLIED, root, arguments, {"serial": serial})
    return code


def ansible_playbook(argv: list[str]) -> int:
    """The control node's `ansible-playbook`: the same arguments, but each playbook is a recorded run."""
    from ansible.cli.playbook import PlaybookCLI  # Ansible's own parser; it takes half a second to import

    split = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    split.add_argument("-i", "--inventory", "--inventory-file", action="append")
    inventories, rest = split.parse_known_args(argv)
    parser = PlaybookCLI(["ansible-playbook", *rest])
    parser.init_parser()
    arguments = parser.parser.parse_args(rest)
    words = [word for word in rest if word not in arguments.args]
    # Other ways to run less than all of it, by the names that Ansible's parser gives them.
    less = ("start_at_task", "step", "syntax", "listhosts", "listtasks", "listtags")
    for playbook in arguments.args:
        options = argparse.Namespace(
            playbook=playbook,
            inventory=inventories.inventory or [str(ESTATE_INVENTORY)],
            limit=arguments.subset,
            tags=",".join(arguments.tags or ()),
            skip_tags=",".join(arguments.skip_tags or ()),
            extra_vars=arguments.extra_vars or [],
            check=arguments.check,
            diff=arguments.diff,
            ansible=[f"--{name.replace('_', '-')}" for name in less if getattr(arguments, name)],
            unrecorded=None,
        )
        if code := _run(options, words):
            return code
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    root = source_tree.located()
    inventories = [inventory_path(place, root) for place in arguments.inventory]
    if arguments.limit:
        arguments.limit += ",localhost"  # who writes the report
    chosen = {"verify_roles": arguments.tags, "verify_skipped_roles": arguments.skip_tags}
    roles = {name: names.split(",") for name, names in chosen.items() if names}
    # Not as tags, of which a role's checks have none.
    words = _words(argparse.Namespace(**vars(arguments) | {"tags": None, "skip_tags": None}))
    words += ["--extra-vars", json.dumps(roles)] if roles else []
    with tempfile.TemporaryDirectory(prefix="llmkeep-", dir=memory()) as folder:
        report = arguments.report.resolve() if arguments.report else Path(folder) / "report.json"
        code, results = verification.run(root, inventories, arguments, words, report, quiet=arguments.json)
        if arguments.json and report.exists():
            print(report.read_text(), end="")
        elif arguments.json:
            print(json.dumps({"ok": False, "checks": 0, "hosts": {}, "failures": results.failures}))
        if not report.exists():
            print("llmkeep: the checks did not complete, so nothing is proved", file=sys.stderr)
            return code or 1
    return code


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep site | verify | run`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "-i", "--inventory", action="append", required=True, help="file or folder; may be repeated"
    )
    common.add_argument("-l", "--limit", help="limit the run to these hosts")
    common.add_argument("-t", "--tags", help="run only these roles")
    common.add_argument("--skip-tags", help="skip these roles")
    common.add_argument(
        "-e", "--extra-vars", action="append", default=[], metavar="VARS", help="as for ansible-playbook"
    )
    common.add_argument(
        "-C", "--check", action="store_true", help="print the changes that would be made; change nothing"
    )
    common.add_argument("-D", "--diff", action="store_true", help="show the changes in files")
    common.add_argument("-v", "--verbose", action="count", default=0, help="more, up to -vvvv")
    common.add_argument(
        "--unrecorded",
        metavar="REASON",
        help="run even if the audit record cannot be written; REASON goes to the journal",
    )
    common.add_argument("ansible", nargs="*", help="further arguments for ansible-playbook, after --")
    parser = subparsers.add_parser("site", parents=[common], help="apply the inventory to the estate")
    parser.set_defaults(run=_run, playbook=None)
    parser = subparsers.add_parser(
        "verify", parents=[common], help="run all checks and report; changes nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the report and nothing else")
    parser.add_argument("--report", type=Path, help="write the report to this file")
    parser.set_defaults(run=_verify)
    # Its own parent, before the common one: the playbook comes first, more words for Ansible come last.
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("playbook", help="for example playbooks/renew.yml")
    parser = subparsers.add_parser("run", parents=[named, common], help="run one playbook")
    parser.set_defaults(run=_run)
