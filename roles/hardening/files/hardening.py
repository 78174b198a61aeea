"""What this host lets programs and people do, as findings of the role's checks. Reads alone, and prints JSON.

Its argument is a JSON object: `sysctl` (parameter: value), `modules`, `mounts` (path: options), `partitions` (paths whose options
are checked though /etc/fstab has a line of the host's own), `banner`, `seconds` (of a session), `confined` (unit: profile),
`confinement` (where each such unit's profile is named), `paths` and `keys` (audit rules).
"""

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROC = Path("/proc/sys")
AUDIT = "/usr/sbin/auditctl"
DAY = 86400
LAST = Path("/var/lib/llmkeep-integrity/last.json")
# (error of libpwquality or a score of at least 0, password): too short, of one class, and one that is good enough.
PASSWORDS = (("Kx7!vQ2z", False), ("aaaabbbbccccdddd", False), ("Quiet-Harbor-71-Lantern", True))

Finding = tuple[bool, str] | tuple[bool, str, str]  # holds, observed, and why it cannot hold on this host


def output(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def settings(path: str) -> list[list[str]]:
    """Words of the lines that are no comments."""
    lines = (line.split("#")[0].replace("=", " ").split() for line in text(path).splitlines())
    return [words for words in lines if words]


def verdict(wrong: list[str], right: str) -> Finding:
    return not wrong, ", ".join(wrong) or right


def is_read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def kernel_parameters(expected: dict[str, str]) -> Finding:
    """A parameter that a container may not set is its machine's."""
    wrong: list[str] = []
    foreign: list[str] = []
    absent = 0
    for name, value in expected.items():
        path = PROC / name.replace(".", "/")
        try:
            observed = " ".join(path.read_text().split())
        except FileNotFoundError:
            absent += 1
            continue
        if observed != " ".join(value.split()):
            (foreign if is_read_only(path) else wrong).append(f"{name} is {observed}, not {value}")
    if foreign and not wrong:
        return False, ", ".join(foreign), "a container has no say in these parameters of its machine"
    return verdict(wrong, f"{len(expected) - absent} as declared, {absent} not in this kernel")


def modules(expected: list[str]) -> Finding:
    refused = set(re.findall(r"^install (\S+) /bin/false$", output("modprobe", "--showconfig"), re.MULTILINE))
    loaded = {line.split()[0] for line in text("/proc/modules").splitlines()}
    names = [name.replace("-", "_") for name in expected]
    wrong = [f"{name} can be loaded" for name in names if name not in refused]
    # Of a container these are the machine's.
    if not Path("/run/systemd/container").exists():
        wrong += [f"{name} is loaded" for name in names if name in loaded]
    return verdict(wrong, f"{len(names)} are refused")


def own_partitions() -> set[str]:
    lines, inside = set(), False
    for line in text("/etc/fstab").splitlines():
        if line in ("# BEGIN hardening", "# END hardening"):
            inside = line == "# BEGIN hardening"
        elif not inside and len(words := line.split()) > 1 and not line.startswith("#"):
            lines.add(words[1])
    return lines


def mounts(expected: dict[str, list[str]], partitions: list[str]) -> Finding:
    table = [line.split() for line in text("/proc/self/mountinfo").splitlines()]
    present = {words[4]: set(words[5].split(",")) for words in table}
    own = own_partitions() - set(partitions)
    wrong: list[str] = []
    waiting: list[str] = []
    for path in sorted(set(expected) - own):
        if path not in present:
            (waiting if any(other.startswith(f"{path}/") for other in present) else wrong).append(
                f"{path} is no mount"
            )
        elif missing := sorted(set(expected[path]) - present[path]):
            wrong.append(f"{path} lacks {' '.join(missing)}")
    if waiting and not wrong:
        return (
            False,
            ", ".join(waiting),
            "it is mounted at the next boot, since something is mounted below it",
        )
    return verdict(
        wrong, "options as declared" + (f"; the host's own: {' '.join(sorted(own))}" if own else "")
    )


def passwords() -> Finding:
    """By libpwquality, whose settings are pam_pwquality's."""
    library = ctypes.CDLL("libpwquality.so.1")
    library.pwquality_default_settings.restype = ctypes.c_void_p
    error = ctypes.c_void_p()
    pwquality = ctypes.c_void_p(library.pwquality_default_settings())
    if library.pwquality_read_config(pwquality, None, ctypes.byref(error)) != 0:
        return False, "/etc/security/pwquality.conf cannot be read"
    wrong = []
    for password, good in PASSWORDS:
        score = library.pwquality_check(pwquality, password.encode(), None, None, ctypes.byref(error))
        if (score >= 0) != good:
            wrong.append(f"a password of {len(password)} characters is {'refused' if good else 'taken'}")
    stack = [
        word for words in settings("/etc/pam.d/common-password") for word in words if word.endswith(".so")
    ]
    order = [name for name in stack if name in ("pam_pwquality.so", "pam_pwhistory.so", "pam_unix.so")]
    if order != ["pam_pwquality.so", "pam_pwhistory.so", "pam_unix.so"]:
        wrong.append(f"/etc/pam.d/common-password asks {' '.join(order) or 'nothing'}")
    return verdict(wrong, "weak and used ones are refused")


def lockout() -> Finding:
    auth = [words for words in settings("/etc/pam.d/common-auth") if words[0] == "auth"]
    steps = [
        word for words in auth for word in words if word in ("preauth", "authfail", "authsucc", "pam_unix.so")
    ]
    wrong = (
        []
        if steps == ["preauth", "pam_unix.so", "authfail", "authsucc"]
        else [f"/etc/pam.d/common-auth: {' '.join(steps)}"]
    )
    if ["account", "required", "pam_faillock.so"] not in settings("/etc/pam.d/common-account"):
        wrong.append("/etc/pam.d/common-account does not count")
    values = {
        words[0]: words[1] if len(words) > 1 else "" for words in settings("/etc/security/faillock.conf")
    }
    for name, value in (("deny", "3"), ("fail_interval", "900"), ("unlock_time", "900")):
        if values.get(name) != value:
            wrong.append(f"{name} is {values.get(name)}, not {value}")
    return verdict(wrong, "three wrong passwords lock an account for 900 s")


def ages() -> Finding:
    values = {words[0]: words[1] for words in settings("/etc/login.defs") if len(words) > 1}
    required = {
        "PASS_MAX_DAYS": "365",
        "PASS_MIN_DAYS": "1",
        "PASS_WARN_AGE": "7",
        "ENCRYPT_METHOD": "YESCRYPT",
    }
    wrong = [
        f"{name} is {values.get(name)}, not {value}"
        for name, value in required.items()
        if values.get(name) != value
    ]
    for line in text("/etc/shadow").splitlines():
        name, secret, _, _, most = line.split(":")[:5]
        old = not most.isdecimal() or int(most) > 365
        if old and (name == "root" or secret[:1] == "$"):
            wrong.append(f"the password of {name} may be {most or 'ever so many'} days old")
        if not secret:
            wrong.append(f"{name} has an empty password")
    return verdict(wrong, "at most 365 days")


def su() -> Finding:
    rule = ["auth", "required", "pam_wheel.so", "use_uid", "group", "sugroup"]
    wrong = [] if rule in settings("/etc/pam.d/su") else ["/etc/pam.d/su lets any group in"]
    members = re.findall(r"^sugroup:[^:]*:\d+:(.*)$", text("/etc/group"), re.MULTILINE)
    if members != [""]:
        wrong.append(f"group sugroup: {members[0] if members else 'is not there'}")
    return verdict(wrong, "no one but root")


def sudo() -> Finding:
    """As sudo's own parser reads its files: what holds for everyone, the last word counting."""
    rules = json.loads(output("cvtsudoers", "--output-format=json", "/etc/sudoers"))
    options: dict[str, Any] = {}
    for entry in rules["Defaults"]:
        if "Binding" not in entry:
            for option in entry["Options"]:
                options |= option
    required: dict[str, Any] = dict.fromkeys(
        ("env_reset", "ignore_dot", "noexec", "requiretty", "use_pty"), True
    )
    required |= {"umask": "0077", "logfile": "/var/log/sudo.log"}
    wrong = [f"{name} is {options.get(name)}" for name in required if options.get(name) != required[name]]
    return verdict(wrong, "as declared")


def sessions(seconds: int) -> Finding:
    script = "umask; echo ${TMOUT-}; readonly -p | grep --count 'TMOUT='"
    login = subprocess.run(
        ["bash", "--login", "-c", script], capture_output=True, text=True, check=False, env={"HOME": "/"}
    )
    inside = subprocess.run(
        ["bash", "-i", "-c", "umask"], capture_output=True, text=True, check=False, env={"HOME": "/"}
    )
    observed = [*login.stdout.split(), *inside.stdout.split()]
    required = ["0077", str(seconds), "1", "0077"]
    return observed == required, f"umask and seconds of shells: {' '.join(observed)}"


def banners(banner: str) -> Finding:
    wrong = []
    for name in ("/etc/issue", "/etc/issue.net", "/etc/motd"):
        status = Path(name).stat()
        if text(name).strip() != banner:
            wrong.append(f"{name} has another text")
        if (status.st_uid, status.st_gid, status.st_mode & 0o7133) != (0, 0, 0):
            wrong.append(f"{name} is not root's alone to change")
    return verdict(wrong, banner)


def jobs() -> Finding:
    """Who may plan jobs with cron and at, and who may look at them."""
    wrong = [
        f"{name} lets others in" for name in ("/etc/cron.allow", "/etc/at.allow") if text(name) != "root\n"
    ]
    wrong += [f"{name} is there" for name in ("/etc/cron.deny", "/etc/at.deny") if Path(name).exists()]
    for path in [*sorted(Path("/etc").glob("cron.*ly")), Path("/etc/cron.d")]:
        if path.stat().st_mode & 0o077 or path.stat().st_uid:
            wrong.append(f"{path} is open to others")
    return verdict(wrong, "root alone")


def apparmor() -> Finding:
    if text("/sys/module/apparmor/parameters/enabled").strip() != "Y":
        return False, "AppArmor is off", "this kernel has AppArmor off, or it is the machine's of a container"
    try:
        profiles = Path("/sys/kernel/security/apparmor/profiles").read_text().splitlines()
    except OSError as problem:
        return False, str(problem), "a container does not see the profiles of its machine"
    lax = [line for line in profiles if not line.endswith(("(enforce)", "(unconfined)", "(kill)"))]
    return verdict(lax, f"{len(profiles)} profiles, none of which only complains")


def running(units: list[str]) -> list[tuple[str, dict[str, str]]]:
    """Each unit of these that runs, a template's instances included, as systemd has it: the name in UNITS, and properties."""
    instances = {unit.replace("@.", "@*."): unit for unit in units}
    properties = "Id,ControlGroup,ExecMainStartTimestamp,ExecMainPID"
    blocks = output("systemctl", "show", "--timestamp=unix", f"--property={properties}", "--", *instances)
    shown = [
        dict(line.split("=", 1) for line in block.splitlines()) for block in blocks.strip().split("\n\n")
    ]
    return [(re.sub("@.*[.]", "@.", unit["Id"]), unit) for unit in shown if unit and unit.get("ControlGroup")]


def confined(expected: dict[str, str], confinement: str) -> Finding:
    """As the kernel confines the processes of units that run. A unit older than the file that names its profile waits."""
    if Path("/run/systemd/container").exists():
        return False, "no profile", "AppArmor is the machine's of a container"
    if text("/sys/module/apparmor/parameters/enabled").strip() != "Y":
        return False, "AppArmor is off", "this kernel has AppArmor off"
    wrong: list[str] = []
    waiting: list[str] = []
    units = running(list(expected))
    for name, unit in units:
        profiles = {
            text(f"/proc/{pid}/attr/current").strip()
            for pid in text(f"/sys/fs/cgroup{unit['ControlGroup']}/cgroup.procs").split()
        } - {""}  # it has ended meanwhile
        if strange := sorted(profiles - {f"{expected[name]} (enforce)"}):
            declared = Path(confinement.format(name))
            late = declared.exists() and declared.stat().st_mtime >= int(unit["ExecMainStartTimestamp"][1:])
            (waiting if late else wrong).append(f"{unit['Id']} runs as {' '.join(strange)}")
    if waiting and not wrong:
        return False, ", ".join(waiting), "it is confined from its next start on: systemctl restart UNIT"
    return verdict(wrong, f"{len(units)} units by {len({expected[name] for name, _ in units})} profiles")


def events(paths: list[str], keys: list[str]) -> Finding:
    """As the kernel has its rules: one for each path, and of each key one for system calls of either width."""
    if Path("/run/systemd/container").exists():
        return False, "no audit", "a container cannot audit"
    status = output(AUDIT, "-s")
    rules = [line for line in output(AUDIT, "-l").splitlines() if line.startswith("-")]
    wrong = [] if re.search(r"^enabled [12]$", status, re.MULTILINE) else ["auditing is off"]
    if re.search(r"^pid 0$", status, re.MULTILINE):
        wrong.append("auditd does not run")
    if output("systemctl", "is-active", "systemd-journald-audit.socket").strip() != "active":
        wrong.append("the journal has no events: systemctl restart systemd-journald")
    watched = {word.removeprefix("path=") for line in rules for word in line.split()}
    wrong += [f"no rule about {path}" for path in paths if path not in watched]
    for key in keys:
        widths = {
            width
            for width in ("b32", "b64")
            for line in rules
            if f"arch={width}" in line and f"key={key}" in line
        }
        wrong += [] if len(widths) == 2 else [f"no rule for {key} of 32 and 64 bit"]
    return verdict(wrong, f"{len(rules)} rules")


def integrity() -> Finding:
    if output("systemctl", "is-active", "llmkeep-integrity.timer").strip() != "active":
        return False, "no comparison is planned"
    try:
        last = json.loads(LAST.read_text())
        unknown, age = list(last["unexplained"]), time.time() - int(last["time"])
    except FileNotFoundError:
        return True, "the first comparison is still to come"
    except (ValueError, KeyError, TypeError, OSError) as problem:
        return False, f"{LAST} cannot be read: {problem}"
    wrong = [f"{path} changed" for path in unknown[:20]]
    if age > 3 * DAY:
        wrong.append(f"the last comparison is {int(age // DAY)} days old")
    return verdict(wrong, "no file changed but by llmkeep or a package")


def finding(question: Callable[..., Finding], *arguments: Any) -> dict[str, Any]:
    """The result of one question. What it could not ask is no pass."""
    try:
        holds, observed, *reason = question(*arguments)
    except (OSError, ValueError, LookupError) as problem:
        holds, observed, reason = False, f"{type(problem).__name__}: {problem}", []
    return {"ok": holds, "observed": observed} | ({"not_enforceable": reason[0]} if reason else {})


def main() -> None:
    declared: dict[str, Any] = json.loads(sys.argv[1])
    checks = {
        "kernel_parameters": finding(kernel_parameters, declared["sysctl"]),
        "modules": finding(modules, declared["modules"]),
        "mounts": finding(mounts, declared["mounts"], declared["partitions"]),
        "passwords": finding(passwords),
        "lockout": finding(lockout),
        "ages": finding(ages),
        "su": finding(su),
        "sudo": finding(sudo),
        "sessions": finding(sessions, declared["seconds"]),
        "banners": finding(banners, declared["banner"]),
        "jobs": finding(jobs),
        "apparmor": finding(apparmor),
        "confined": finding(confined, declared["confined"], declared["confinement"]),
        "events": finding(events, declared["paths"], declared["keys"]),
        "integrity": finding(integrity),
    }
    print(json.dumps({"checks": checks}))


if __name__ == "__main__":
    main()
