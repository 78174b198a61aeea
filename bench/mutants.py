#!/usr/bin/python3.13
"""Mutation testing: finds small changes of a package's code that its fast tests do not notice.

mutmut mutates a copy of the package and runs for each mutant the tests that call the mutated function, the shortest
first, until one fails. The tree itself is not changed. Not mutated: text for people (`raise`, `print`, `log`, `help=`,
`Finding`), and what mutmut leaves alone (constants of modules, decorated functions).

    bench/mutants.py llmproof [--only 'llmproof.chain.*']
    bench/mutants.py llmserve/access
    bench/mutants.py module_utils/volumes

Needs `make env` and `make peers PEER=mutmut`. Prints each survivor as a diff, then a table.
Exit code 0, or 1 if fewer than 90 % of the mutants are killed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / "bench/.venv-mutmut/bin/python"
GOAL = 0.9
TEXT = [
    "raise \\w+",
    'print\\(f?"',
    "^\\s*print\\($",
    "help=",
    "sys\\.stderr",
    "yield Finding\\(",
    "log\\.(info|warning|error)\\(",
]
# The policy engine has threads, which do not survive a fork: mutants are forked from a process that only collected.
WAYS = {"process_isolation": "forkserver", "timeout_multiplier": "5", "timeout_constant": "5"}


@dataclass(frozen=True)
class Package:
    """`source` and `only` are relative to `tree`, a folder of the repository; `tests` are names of files anywhere below
    its tests.

    `leave_out`: words in the names of tests that are slow or call none of the code. `by_process`: how names of
    functions begin, and the file of the tests that call them in a process of its own, which mutmut does not see.
    `at`: where the copy of `tree` is below the folder that Python imports from; mutmut names modules after paths.
    `linked`: what tests read beside `tree`.
    """

    source: str
    only: str
    tests: list[str]
    leave_out: list[str]
    by_process: dict[str, str] = field(default_factory=dict)
    tree: str = "."
    at: str = "."
    linked: list[str] = field(default_factory=list)


PACKAGES = {
    "llmproof": Package(
        source="llmproof",
        only="llmproof/*",
        tests=["test_audit_chain.py", "test_audit_heads.py", "test_audit_verify.py", "test_audit_service.py",
               "test_audit_cli.py", "test_policy_bundle.py"],
        leave_out=["killed_at", "opa_refuses", "opas_own", "any_kind", "floods", "every_value_at",
                   "every_single", "changed_byte_is_found", "cut_at_any_line", "never_cries_wolf"],
        by_process={
            "llmproof.service.": "test_audit_service.py",
            "llmproof.cli.x_run_serve": "test_audit_service.py",
            "llmproof.cli.x_parser": "test_audit_service.py",
            "llmproof.cli.x_told": "test_audit_cli.py",
        },
    ),
    "llmserve/access": Package(
        source="llmserve",
        only="llmserve/access/*",
        tree="payload",
        tests=["test_key_records.py", "test_key_commands.py", "test_last_used.py", "test_identity.py", "test_oidc.py",
               "test_policy_cache.py", "test_opa_connection.py", "test_quotas.py"],
        leave_out=["through_the_edge", "running_streams", "shares_no_cached", "shows_in_the_metrics", "check_command"],
        linked=["roles", "policy", "llmkeep"],
    ),
    "module_utils/volumes": Package(
        source="plugins",
        only="plugins/module_utils/volumes/*",
        at="ansible_collections/llmkeep/estate",
        tests=["test_disk_probes.py", "test_volume_parts.py", "test_disks.py", "test_luks_escrow.py",
               "test_luks_swap.py", "test_luks_volume.py", "test_volume_verbs.py"],
        leave_out=["killed_anywhere", "wherever_it_was_killed", "escrow_key_is_for_a_person"],
        by_process={
            "ansible_collections.llmkeep.estate.plugins.module_utils.volumes.mount_points.": "test_luks_escrow.py",
        },
    ),
}  # fmt: skip


def prepare(package: Package, work: Path) -> None:
    """A copy of the package and its tests, and mutmut's settings beside it."""
    tree, at = ROOT / package.tree, Path(package.at)
    for folder in (package.source, "tests"):
        shutil.copytree(
            tree / folder,
            work / at / folder,
            ignore=shutil.ignore_patterns("pyproject.toml", "__pycache__"),
        )
    for name in package.linked:
        (work / name).symlink_to(ROOT / name)
    shutil.copy(tree / "pyproject.toml", work)
    tests = [
        str(path.relative_to(work))
        for name in package.tests
        for path in sorted((work / at / "tests").rglob(name))
    ]
    settings = {
        "source_paths": at / package.source,
        "only_mutate": at / package.only,
        "do_not_mutate": "*/__main__.py",
        "do_not_mutate_patterns": "\n".join(TEXT),
        "also_copy": at / "tests",
        "pytest_add_cli_args_test_selection": "\n".join(tests),
        "pytest_add_cli_args": f"-k\nnot ({' or '.join(package.leave_out)})\n-p\nno:cacheprovider"
                               f"\n-o\npythonpath={at / 'tests/helpers'} {ROOT / 'tests/helpers'}",
        **WAYS,
    }  # fmt: skip
    lines = [f"{name}={value}".replace("\n", "\n    ") for name, value in settings.items()]
    (work / "setup.cfg").write_text("\n".join(["[mutmut]", *lines]) + "\n")


def mutmut(work: Path, *arguments: str) -> str:
    """Its output, or CalledProcessError."""
    return subprocess.run(
        [PYTHON, "-m", "mutmut", *arguments], cwd=work, env=os.environ | {"TMPDIR": str(work.parent)},
        stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip


def add_tests_of_processes(package: Package, work: Path) -> None:
    """Name the tests of modules that are run in processes of their own."""
    path = work / "mutants/mutmut-stats.json"
    stats = json.loads(path.read_text())
    called = stats["tests_by_mangled_function_name"]
    for function in {mutant.partition("__mutmut_")[0] for mutant in results(work)}:
        for start, file in package.by_process.items():
            if function.startswith(start):
                called[function] = [test for test in stats["duration_by_test"] if f"/{file}::" in test]
    path.write_text(json.dumps(stats))


def results(work: Path) -> dict[str, str]:
    """The outcome of each mutant."""
    lines = [line.strip() for line in mutmut(work, "results", "--all", "true").splitlines()]
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def changed(diff: str) -> str:
    """A diff's changed lines."""
    return "\n".join(
        line for line in diff.splitlines() if line.startswith(("-", "+")) and line[:3] not in ("---", "+++")
    )


def table(outcome: dict[str, str]) -> str:
    """Mutants by module; killed includes those that ran into the time limit."""
    modules: dict[str, Counter[str]] = {}
    for mutant, status in outcome.items():
        modules.setdefault(mutant.rpartition(".")[0], Counter())[status] += 1
    lines = [f"{'module':<32}{'mutants':>8}{'killed':>8}{'timeout':>8}{'left':>8}"]
    for module, counts in sorted(modules.items()):
        gone = counts["killed"] + counts["timeout"]
        lines.append(
            f"{module:<32}{counts.total():>8}{gone:>8}{counts['timeout']:>8}{counts.total() - gone:>8}"
        )
    return "\n".join(lines)


def campaign(work: Path, names: list[str], minutes: float | None) -> None:
    """Run these mutants, or all if none is named; mutmut begins with those whose tests are short."""
    # A mutant that is killed leaves what its test mounted: with the last process, the mounts of its name space go.
    alone = ["unshare", "--mount", "--propagation", "private"] if os.geteuid() == 0 else []
    with subprocess.Popen(
        [*alone, PYTHON, "-m", "mutmut", "run", "--max-children", "1", *names],
        cwd=work, env=os.environ | {"TMPDIR": str(work.parent)},
    ) as process:  # fmt: skip
        try:
            code = process.wait(minutes and minutes * 60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it saves what it has
            code = 0
    if code:
        raise subprocess.CalledProcessError(code, process.args)


def run(package: Package, only: list[str], minutes: float | None, work: Path) -> int:
    """The exit code."""
    prepare(package, work)
    campaign(work, only, minutes)
    if package.by_process:
        add_tests_of_processes(package, work)
        left = [mutant for mutant, status in results(work).items() if status in ("no tests", "survived")]
        again = [mutant for mutant in left if mutant.startswith(tuple(package.by_process))]
        if again:
            campaign(work, again, minutes)
    found = results(work)
    outcome = {mutant: status for mutant, status in found.items() if status != "not checked"}
    for mutant, status in outcome.items():
        if status not in ("killed", "timeout"):
            print(f"\n{mutant}: {status}\n{changed(mutmut(work, 'show', mutant))}")
    print(f"\n{table(outcome)}")
    killed = sum(status in ("killed", "timeout") for status in outcome.values()) / len(outcome)
    not_run = f", {len(found) - len(outcome)} were not run" if len(found) > len(outcome) else ""
    print(f"{killed:.1%} of {len(outcome)} are killed, the goal is {GOAL:.0%}{not_run}")
    return 0 if killed >= GOAL else 1


def main() -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", choices=PACKAGES)
    parser.add_argument("--only", nargs="+", default=[], help="names of mutants, with wildcards")
    parser.add_argument("--tests", nargs="+", help="files of tests, instead of all of the package's")
    parser.add_argument("--minutes", type=float, help="stop then; mutants with slow tests come last")
    options = parser.parse_args()
    # A shell's background job ignores it, and so would mutmut.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not PYTHON.exists():
        print(f"there is no {PYTHON}: make peers PEER=mutmut", file=sys.stderr)
        return 1
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a folder of its own in it
    with tempfile.TemporaryDirectory(prefix="mutants-", dir=memory) as folder:
        package = PACKAGES[options.package]
        package = replace(package, tests=options.tests or package.tests)
        return run(package, options.only, options.minutes, Path(folder, "work"))


if __name__ == "__main__":
    sys.exit(main())
