"""Prints as JSON, as findings of the role's checks, who may log in to this host as an operator and run which commands.

Its argument is a JSON object: `accounts` (name and first day without access), `group`, `keys` (lines by name), `commands` (by
name), `output` (the folder of sudo's recordings) and `log` (sudo's log file).
"""

import grp
import json
import pwd
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

KEYS = Path("/etc/ssh/operators")
SHADOW = Path("/etc/shadow")
PROC = Path("/proc")
BREAKGLASS = "breakglass"
ANNOUNCEMENT = Path("/usr/local/lib/llmkeep/breakglass")
PAM = Path("/etc/pam.d/llmkeep-breakglass")
TOKENS = ("sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com")
LLMKEEP = "/usr/local/bin/llmkeep"
RULE = ["session", "optional", "pam_exec.so", "quiet", str(ANNOUNCEMENT)]

Finding = tuple[bool, str]


def output(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(argv)[:80]} ended with {done.returncode}: {done.stderr.strip()[:200]}")
    return done.stdout


def verdict(wrong: list[str], right: str) -> Finding:
    return not wrong, ", ".join(wrong) or right


def is_roots(path: Path, forbidden: int) -> bool:
    """Owned by root, without any bit of FORBIDDEN, and not a link."""
    status = path.lstat()
    return not stat.S_ISLNK(status.st_mode) and status.st_uid == 0 and not status.st_mode & forbidden


def busy(uid: int) -> bool:
    for path in PROC.glob("[0-9]*"):
        try:
            if path.stat().st_uid == uid:
                return True
        except OSError:  # it has ended
            continue
    return False


def accounts(declared: list[dict[str, str]], group: str) -> Finding:
    gid = grp.getgrnam(group).gr_gid
    shadow = {line.split(":")[0]: line.split(":") for line in SHADOW.read_text().splitlines()}
    present = {each.pw_name: each for each in pwd.getpwall() if each.pw_gid == gid}
    ends = {each["name"]: each["expires"] for each in declared}
    wrong = [f"{name} is not there" for name in sorted(ends.keys() - present.keys())]
    for name, account in sorted(present.items()):
        secret, end = shadow[name][1], shadow[name][7]
        if secret[:1] not in ("!", "*"):
            wrong.append(f"{name} has a password")
        if name not in ends:
            if (end, account.pw_shell) != ("1", "/usr/sbin/nologin"):
                wrong.append(f"{name} was removed and is not locked")
            if busy(account.pw_uid):
                wrong.append(f"{name} was removed and has processes")
        elif end != (str((date.fromisoformat(ends[name]) - date(1970, 1, 1)).days) if ends[name] else ""):
            wrong.append(f"{name} ends on day {end or 'none'}, not on {ends[name] or 'none'}")
    former = ", ".join(sorted(present.keys() - ends.keys()))
    return verdict(wrong, f"{len(ends)} as declared; locked: {former or 'none'}")


def sshd(name: str) -> dict[str, str]:
    """sshd's options, as it reads its own files, for a login by this name."""
    lines = output("sshd", "-T", "-C", f"user={name},host=localhost,addr=127.0.0.1").splitlines()
    return dict(line.split(" ", 1) for line in lines if " " in line)


def keys(declared: dict[str, list[str]]) -> Finding:
    wrong = [] if is_roots(KEYS, 0o022) else [f"{KEYS} is not root's alone to change"]
    present = {path.name: path for path in KEYS.iterdir()}
    wrong += [f"{name} has keys and is not declared" for name in sorted(present.keys() - declared.keys())]
    for name, lines in declared.items():
        if name not in present or present[name].read_text().splitlines() != lines:
            wrong.append(f"{name} has other keys than the declared ones")
        elif not is_roots(present[name], 0o022):
            wrong.append(f"{present[name]} is not root's alone to change")
        if (place := sshd(name)["authorizedkeysfile"]) != f"{KEYS}/%u":
            wrong.append(f"sshd looks for keys of {name} in {place}")
    return verdict(wrong, f"keys of {len(declared)} accounts")


def tokens(declared: dict[str, list[str]]) -> Finding:
    wrong = []
    for name in declared.keys() - {BREAKGLASS}:
        options = sshd(name)
        if plain := sorted({*options["pubkeyacceptedalgorithms"].split(",")} - {*TOKENS}):
            wrong.append(f"sshd takes from {name} {' '.join(plain)}")
        if "verify-required" not in options["pubkeyauthoptions"].split():
            wrong.append(f"sshd takes from {name} a token that did not verify its holder")
    return verdict(sorted(wrong), "touched and verified")


def sudoers() -> dict[str, Any]:
    """sudo's rules, as its own parser reads them."""
    rules: dict[str, Any] = json.loads(
        output("cvtsudoers", "--expand-aliases", "--output-format=json", "/etc/sudoers")
    )
    return rules


def concerns(binding: dict[str, Any], name: str, group: str) -> bool:
    """True if a rule's user may be this one; an expression that is not understood may be."""
    if user := binding.get("username"):
        return user in (name, "ALL")
    if other := binding.get("usergroup"):
        return other == group or name in (
            grp.getgrnam(other).gr_mem if other in {g.gr_name for g in grp.getgrall()} else []
        )
    return "command" not in binding


def defaults(rules: dict[str, Any], name: str, group: str) -> dict[str, Any]:
    """Options for a user's commands, the last one winning; without those of single commands."""
    options: dict[str, Any] = {}
    for own in (False, True):
        for entry in rules.get("Defaults", []):
            binding = entry.get("Binding", [])
            if bool(binding) == own and (not own or any(concerns(each, name, group) for each in binding)):
                for option in entry["Options"]:
                    options |= option
    return options


def commands(declared: dict[str, list[str]], group: str) -> Finding:
    rules = sudoers()
    wrong = []
    for name, expected in declared.items():
        allowed: set[str] = set()
        for spec in rules.get("User_Specs", []):
            if not any(concerns(each, name, group) for each in spec["User_List"]):
                continue
            for each in spec["Cmnd_Specs"]:
                allowed |= {str(command.get("command", command)) for command in each["Commands"]}
                options = {key: value for option in each.get("Options", []) for key, value in option.items()}
                if options.get("noexec") is False or options.get("setenv"):
                    wrong.append(f"a rule of {name} lets commands start others, or set variables")
        wrong += [f"{name} may run {command}" for command in sorted(allowed - {*expected})]
        wrong += [f"{name} may not run {command}" for command in sorted({*expected} - allowed)]
        if not defaults(rules, name, group).get("noexec"):
            wrong.append(f"commands of {name} may start others")
    free = {
        str(each.get("command"))
        for entry in rules.get("Defaults", [])
        for each in entry.get("Binding", [])
        if "command" in each and {"noexec": False} in entry["Options"]
    }
    wrong += [f"{command} may start others" for command in sorted(free - {LLMKEEP})]
    return verdict(wrong, f"{sum(map(len, declared.values()))} commands of {len(declared)} operators")


def recorded(group: str, folder: str, log: str) -> Finding:
    options = defaults(sudoers(), "", group)
    required = {"log_output": True, "log_input": False, "iolog_dir": folder, "use_pty": True}
    required |= {"log_exit_status": True, "loglinelen": "0", "logfile": log}
    wrong = [f"{name} is {options.get(name)}" for name in required if options.get(name) != required[name]]
    if options.get("syslog") is False:
        wrong.append("commands are not logged")
    if not is_roots(Path(folder), 0o077):
        wrong.append(f"{folder} is open to others")
    if subprocess.run(
        ["systemctl", "is-active", "--quiet", "llmkeep-sudo-output.timer"], check=False
    ).returncode:
        wrong.append("the output is neither listed nor bounded: llmkeep-sudo-output.timer is not active")
    return verdict(wrong, f"in {folder}")


def breakglass(declared: dict[str, list[str]]) -> Finding:
    if BREAKGLASS not in declared:
        return True, "no such account is declared"
    options = sshd(BREAKGLASS)
    wrong = []
    if (options.get("usepam"), options.get("pamservicename")) != ("yes", PAM.name):
        wrong.append(f"sshd asks PAM for {options.get('pamservicename')}")
    if RULE not in [line.split() for line in PAM.read_text().splitlines()]:
        wrong.append(f"{PAM} does not call {ANNOUNCEMENT}")
    if not is_roots(ANNOUNCEMENT, 0o022) or not ANNOUNCEMENT.stat().st_mode & 0o100:
        wrong.append(f"{ANNOUNCEMENT} is not root's to run")
    return verdict(wrong, "by PAM")


def finding(question: Callable[..., Finding], *arguments: Any) -> dict[str, Any]:
    """The result of one question. A question that could not be answered does not pass."""
    try:
        holds, observed = question(*arguments)
    except (OSError, ValueError, LookupError) as problem:
        holds, observed = False, f"{type(problem).__name__}: {problem}"
    return {"ok": holds, "observed": observed}


def main() -> None:
    declared: dict[str, Any] = json.loads(sys.argv[1])
    group = declared["group"]
    checks = {
        "accounts": finding(accounts, declared["accounts"], group),
        "keys": finding(keys, declared["keys"]),
        "tokens": finding(tokens, declared["keys"]),
        "commands": finding(commands, declared["commands"], group),
        "output": finding(recorded, group, declared["output"], declared["log"]),
        "breakglass": finding(breakglass, declared["keys"]),
    }
    print(json.dumps({"checks": checks}))


if __name__ == "__main__":
    main()
