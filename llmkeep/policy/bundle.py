"""`llmkeep policy init | check | build | verify | diff | break-glass`: the authorization policy, signed on the control node.

The key (ES256) is sealed by systemd-creds and decrypted only in memory. Hosts trust its public half, policy.pem. A policy's
revision only rises, and each policy has a date after which it denies everything.

Exit codes: 0 done; 1 refused, with the reason. `verify` tells refusals apart: 3 unsigned or signed by another key,
4 damaged (a changed, missing or extra file), 5 an older revision than was accepted before, 6 expired.
"""

import argparse
import hashlib
import itertools
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from opa_bindings import OpaError

from llmkeep import source_tree
from llmkeep.durable import FORMAT, record, require_format, write
from llmkeep.errors import LlmkeepError
from llmkeep.places import POLICY_KEY, Places
from llmkeep.policy import source as policy_source
from llmkeep.policy.source import Source
from llmkeep.sealing import seal, unseal
from llmproof import policy_bundle
from llmproof.policy_bundle import ALGORITHM, KEY_ID, Policy, PolicyRefused

DAYS = 90  # how long a policy holds
LEFT = 30  # one with fewer days left is signed anew, with the next revision
AUDIENCE = "llmkeep-break-glass"
HOURS = 4  # how long a break-glass token holds at most


class PolicyError(LlmkeepError):
    """The policy was refused. The message says what is wrong, the value seen, and what to do."""


# ---------------------------------------------------------------- the key
def init(places: Places) -> str:
    """Generate the key if there is none; returns a message for the operator. Idempotent.

    policy.pem is written last and marks completion: without it, no host can have trusted the key, which is then
    generated again.
    """
    if places.policy_public.exists():
        signing_key(places)
        return (
            f"the policy's key already exists; {places.policy_public} has sha256 "
            f"{_sha256(places.policy_public.read_bytes())}"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    places.policy_key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write(places.policy_key, seal(secret, POLICY_KEY), 0o400)
    write(places.policy_public, _pem(key), 0o644)
    return f"created the policy's key; {places.policy_public} has sha256 {_sha256(_pem(key))}"


def signing_key(places: Places) -> ec.EllipticCurvePrivateKey:
    """The key, decrypted in memory and compared with the public key that hosts trust."""
    for path in (places.policy_public, places.policy_key):
        if not path.exists():
            raise PolicyError(
                f"{path} is missing: run `llmkeep policy init`, or restore it from a backup of this host"
            )
    key = serialization.load_pem_private_key(
        unseal(places.policy_key.read_bytes(), POLICY_KEY), password=None
    )
    if not isinstance(key, ec.EllipticCurvePrivateKey) or _pem(key) != places.policy_public.read_bytes():
        raise PolicyError(
            f"{places.policy_key} is not the key of {places.policy_public}: restore both from a backup of this host"
        )
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------- build
def checked(folder: Path) -> Source:
    """The source in FOLDER; PolicyError unless it compiles and its data and tests are in order."""
    source = policy_source.read(folder)
    if problems := policy_source.problems(source):
        raise PolicyError(f"{folder} cannot be signed:\n  " + "\n  ".join(problems) + "\nCorrect this there")
    return source


def build(places: Places, folder: Path, out: Path, days: int, now: datetime | None = None) -> str:
    """Sign FOLDER's policy into OUT; returns a message for the operator. Idempotent.

    The highest revision issued is in revision.json beside OUT, which is on disk before the bundle with that revision.
    After a restore it is a floor for the next revision. A bundle with the same content and enough days left is kept,
    unless there is a floor: hosts may have a higher revision.
    """
    if not 1 <= days <= 366:
        raise PolicyError(f"--days is {days}: a policy is valid for 1 to 366 days")
    return _sign(places, checked(folder), str(folder), out, days, now, above_floor=True)


def renew(places: Places, out: Path, now: datetime | None = None) -> str:
    """Sign OUT's content again if it expires soon. Idempotent.

    Called by the timer that renews certificates. A source that is being edited is not used.
    """
    standing = _standing(out, places)
    if standing is None:
        raise PolicyError(f"{out} is not a policy of this estate: make one with `llmkeep policy build`")
    parts = {f"llm/{name}": content for name, content in standing.data["llm"].items() if name != "meta"}
    return _sign(places, Source(standing.modules, {}, parts), f"revision {standing.revision}", out, DAYS, now)


def _sign(
    places: Places,
    source: Source,
    origin: str,
    out: Path,
    days: int,
    now: datetime | None,
    above_floor: bool = False,
) -> str:
    """Sign SOURCE into OUT, unless OUT has the same content, enough days left, and a revision ABOVE_FLOOR where that is asked."""
    key = signing_key(places)
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    revision_file, standing = out.with_name("revision.json"), _standing(out, places)
    last: dict[str, Any] = (
        json.loads(revision_file.read_bytes()) if revision_file.exists() else {"revision": 0, "sha256": ""}
    )
    require_format(revision_file, last)
    highest = max(last["revision"], standing.revision if standing else 0)
    following = max(highest, last.get("floor", 0)) + 1
    same = last["sha256"] == source.sha256
    if same and standing and standing.revision == last["revision"]:
        enough = standing.expires - moment >= timedelta(days=min(LEFT, days / 3))
        if enough and not (above_floor and "floor" in last):
            return (
                f"{out}: revision {highest} already has the content of {origin}, kept; it expires "
                f"{standing.expires:%Y-%m-%d}"
            )
        highest = following
    elif not same or last["revision"] < highest:
        highest = following
    issued = {"format": FORMAT, "revision": highest, "sha256": source.sha256}
    write(revision_file, json.dumps(issued).encode() + b"\n", 0o644)
    bundle = policy_source.pack(source, highest, moment + timedelta(days=days), key)
    policy_bundle.judged(bundle, places.policy_public.read_bytes(), highest, moment)
    write(out, bundle, 0o644)
    tested = f"{policy_source.tests(source)} tests passed, " if source.tests else ""
    return (
        f"{out}: revision {highest}, {tested}"
        f"valid until {moment + timedelta(days=days):%Y-%m-%d %H:%M} UTC, sha256 {_sha256(bundle)}"
    )


def _standing(out: Path, places: Places) -> Policy | None:
    """The existing bundle, if this estate signed it."""
    try:
        start = datetime.min.replace(tzinfo=UTC)  # its age is looked at by the caller
        return policy_bundle.judged(out.read_bytes(), places.policy_public.read_bytes(), now=start)
    except (FileNotFoundError, PolicyRefused):
        return None


# ---------------------------------------------------------------- diff
def diff(old: Path, new: Path) -> list[dict[str, Any]]:
    """Sets of one or two roles, groups and actions for which the decisions of OLD and NEW differ.

    Signatures are not checked.

    OLD and NEW are bundles or source folders. Revision and expiry are ignored.
    """
    sides = [_engine(old), _engine(new)]
    roles = sorted({role for _, side in sides for role in side["llm"].get("roles", {})})
    actions = sorted({action for opa, _ in sides for action in opa.eval_document("llm.validate.actions")})
    groups = sorted({group for _, side in sides for group in side["llm"].get("groups", {})})
    sets = [[role] for role in roles] + [list(pair) for pair in itertools.combinations(roles, 2)]
    holders = [{"roles": names, "groups": []} for names in sets]
    holders += [{"roles": [], "groups": [group]} for group in groups]
    differences = []
    for each, action in itertools.product(holders, actions):
        holder = {**each, "action": action}
        question = {"subject": "anybody", "tenant": "any", **holder}
        before, after = (opa.eval_document("llm.authz.decision", question) for opa, _ in sides)
        if before != after:
            differences.append({**holder, "old": before, "new": after})
    return differences


def _engine(path: Path) -> tuple[Any, dict[str, Any]]:
    """OPA with a source or a bundle, and its data."""
    if path.is_dir():
        source = policy_source.read(path)
        modules, document = source.modules, source.document
    else:
        files = policy_bundle.unpacked(path.read_bytes())
        files.pop(policy_bundle.SIGNATURES, None)
        policy = policy_bundle.parsed(files)
        modules, document = policy.modules, policy.data
        document["llm"]["meta"] = policy_source.META
    return policy_source.engine(modules, document), document


def _line(change: dict[str, Any]) -> str:
    """One difference as a line of text."""
    old, new = change["old"], change["new"]
    if old["allow"] and new["allow"]:
        moved = [f"{key} {old[key]} → {new[key]}" for key in old if old[key] != new.get(key)]
    else:
        moved = [" → ".join("allow" if side["allow"] else f"deny ({side['rule']})" for side in (old, new))]
    holder = " + ".join(change["roles"] or [f"group {group}" for group in change["groups"]])
    return f"{holder}: {change['action']}: {', '.join(moved)}"


# ---------------------------------------------------------------- break-glass
def break_glass(
    places: Places,
    tenant: str,
    subject: str,
    actions: list[str],
    hours: float,
    reason: str,
    models: list[str] | None = None,
    now: datetime | None = None,
) -> str:
    """A token that permits SUBJECT of TENANT to do ACTIONS for HOURS while a host's policy engine does not answer.

    `models`: the permitted models, all if empty. The token is on record before it is returned.
    """
    if not 0 < hours <= HOURS:
        raise PolicyError(
            f"--hours is {hours:g}: a token is valid for at most {HOURS} hours; give a smaller number"
        )
    if not tenant.strip() or not subject.strip() or not reason.strip():
        raise PolicyError(
            "--tenant, --subject or --reason is empty: the audit record needs the subject, the tenant and the reason"
        )
    known = _engine(source_folder(places))[0].eval_document("llm.validate.actions")
    if unknown := sorted(set(actions) - set(known)):
        raise PolicyError(
            f"--action {unknown[0]!r} is not an action of the gateway: {', '.join(sorted(known))}"
        )
    key, moment = signing_key(places), (now or datetime.now(UTC)).replace(microsecond=0)
    claims = {
        "aud": AUDIENCE,
        "sub": subject,
        "tenant": tenant,
        "iat": int(moment.timestamp()),
        "exp": int((moment + timedelta(hours=hours)).timestamp()),
        "reason": reason,
        "actions": sorted(set(actions)),
        **({"models": sorted(set(models))} if models else {}),
    }
    token = jwt.encode(claims, key, algorithm=ALGORITHM, headers={"kid": KEY_ID})
    record(places.break_glass, {**claims, "time": moment.isoformat(), "sha256": _sha256(token.encode())})
    return token


# ---------------------------------------------------------------- command line
def source_folder(places: Places) -> Path:
    """The estate's own source if it has one, else the tree's."""
    if places.policy_source.is_dir():
        return places.policy_source
    return source_tree.located() / "policy"


def _init(arguments: argparse.Namespace) -> int:
    print(init(arguments.places))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    folder = arguments.source or source_folder(arguments.places)
    print(f"{folder}: no problems, {policy_source.tests(checked(folder))} tests passed")
    return 0


def _build(arguments: argparse.Namespace) -> int:
    places = arguments.places
    folder = arguments.source or source_folder(places)
    print(build(places, folder, arguments.out or places.policy_bundle, arguments.days))
    return 0


def _renew(arguments: argparse.Namespace) -> int:
    print(renew(arguments.places, arguments.places.policy_bundle))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    try:
        key = arguments.key.read_bytes()
        good = policy_bundle.judged(arguments.bundle.read_bytes(), key, arguments.minimum)
    except OSError as error:
        raise PolicyError(
            f"{error.filename}: {error.strerror}: give a bundle, and with --key the key"
        ) from error
    except PolicyRefused as refusal:
        print(f"llmkeep: refused: {arguments.bundle}: {refusal}", file=sys.stderr)
        return refusal.code
    print(
        f"{arguments.bundle}: revision {good.revision}, intact, valid until {good.expires:%Y-%m-%d %H:%M} UTC"
    )
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    try:
        differences = diff(arguments.old, arguments.new)
    except (PolicyRefused, OpaError, OSError) as error:
        raise PolicyError(f"cannot compare these two: {error}") from error
    if arguments.json:
        print(json.dumps(differences))
    else:
        print("\n".join(map(_line, differences)) or "no difference in decisions")
    return 0


def _break_glass(arguments: argparse.Namespace) -> int:
    who = arguments.tenant, arguments.subject
    print(
        break_glass(
            arguments.places, *who, arguments.action, arguments.hours, arguments.reason, arguments.model
        )
    )
    return 0


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep policy init | check | build | renew | verify | diff | break-glass`."""
    parser = subparsers.add_parser("policy", help="check, sign and compare the policy", description=__doc__)
    parser.set_defaults(places=Places())
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("init", help="create the key if there is none (called by bootstrap)")
    verb.set_defaults(run=_init)
    own = "default: /etc/llmkeep/policy/source if it exists, else the tree's policy/"
    verb = verbs.add_parser("check", help="compile a source, check its data and run its tests; signs nothing")
    verb.add_argument("--source", type=Path, help=own)
    verb.set_defaults(run=_check)
    verb = verbs.add_parser("build", help="check a source and sign it; an unchanged one is kept")
    verb.add_argument("--source", type=Path, help=own)
    verb.add_argument("--days", type=int, default=DAYS, help="days of validity (default: %(default)s)")
    verb.add_argument("--out", type=Path, help="default: /var/lib/llmkeep/policy/bundle.tar.gz")
    verb.set_defaults(run=_build)
    verb = verbs.add_parser("renew", help="sign a policy again that expires soon")
    verb.set_defaults(run=_renew)
    verb = verbs.add_parser(
        "verify", help="check signature, every byte, revision and expiry", description=__doc__
    )
    verb.add_argument("bundle", type=Path)
    verb.add_argument("--key", type=Path, required=True, help="the trusted key (PEM)")
    verb.add_argument("--minimum", type=int, default=0, help="the highest revision accepted before")
    verb.set_defaults(run=_verify)
    verb = verbs.add_parser("diff", help="print permissions that roles and groups gained and lost")
    verb.add_argument("old", type=Path, help="a bundle, or a folder with a source")
    verb.add_argument("new", type=Path)
    verb.add_argument("--json", action="store_true", help="for machines")
    verb.set_defaults(run=_diff)
    verb = verbs.add_parser(
        "break-glass", help="print a token for a host whose policy engine does not answer"
    )
    verb.add_argument("--tenant", required=True, help="tenant of the subject, as the gateway knows it")
    verb.add_argument("--subject", required=True, help="the subject that may use it, as the gateway knows it")
    verb.add_argument("--model", action="append", help="a permitted model (default: all); may be repeated")
    verb.add_argument("--action", required=True, action="append", help="as 'POST /generate'; may be repeated")
    verb.add_argument("--hours", type=float, required=True, help=f"hours of validity, at most {HOURS}")
    verb.add_argument("--reason", required=True, help="for the readers of the record")
    verb.set_defaults(run=_break_glass)
