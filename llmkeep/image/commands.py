"""`llmkeep image build | verify | add | list | remove`: an OCI image of gateway, engines, audit writer, OPA and edge, made of a
verified bundle alone.

DIR has the image as an OCI layout in `oci`, its record in `image.json`, and the record's signature by the bundle's key. The
record names the digest that manifests and clusters pin. `add` puts an image on this mirror, from which nodes pull it.

Exit codes: 0 done, 1 refused or failed, 3 unsigned, signed by an unknown key or as something else, 4 damaged (a changed, missing
or extra file), 5 older than an image that was accepted here before, 6 the image or its bundle has expired, 9 the passphrase of
the signing key is wrong or cannot be had.
"""

import argparse
from pathlib import Path

from llmkeep.bundle import keys, manifest
from llmkeep.image import record, served
from llmkeep.image.layers import VARIANTS
from llmkeep.image.record import Record
from llmkeep.places import Places


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep image build | verify | add | list | remove`."""
    parser = subparsers.add_parser(
        "image", help="build and publish the serving software as a container image", description=__doc__
    )
    parser.set_defaults(places=Places())
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser(
        "build", help="build and sign it; needs root, and no network", description=__doc__
    )
    verb.add_argument("--bundle", type=Path, default=Path(".lab/bundle"), help="default: %(default)s")
    verb.add_argument("--out", type=Path, default=Path(".lab/image"), help="default: %(default)s")
    verb.add_argument(
        "--variant",
        choices=VARIANTS,
        default="cpu",
        help="cuda: with vLLM, of a bundle of profile gpu or gpu-debian (default: %(default)s)",
    )
    keys.add_signing_options(verb)
    verb.set_defaults(run=_build)
    trust = argparse.ArgumentParser(add_help=False)
    trust.add_argument(
        "--keyring",
        type=Path,
        default=Path("/etc/apt/keyrings/llmkeep.pgp"),
        help="the trusted keys; never take this file from the image's medium (default: %(default)s)",
    )
    image = argparse.ArgumentParser(add_help=False, parents=[trust])
    image.add_argument("--image", type=Path, default=Path(".lab/image"), help="default: %(default)s")
    for name, purpose, run in (
        ("verify", "signature, record, age, serial, every blob; no network", _verify),
        ("add", "verify it and put it on this mirror", _add),
    ):
        verb = verbs.add_parser(name, help=purpose, description=__doc__, parents=[image])
        verb.set_defaults(run=run)
    verb.add_argument(
        "--allow-older",
        metavar="REASON",
        help="accept it even if an image with a later serial was added before; REASON is put on record",
    )
    verb = verbs.add_parser("list", help="the images on this mirror", parents=[trust])
    verb.set_defaults(run=_list)
    verb = verbs.add_parser("remove", help="remove an image from this mirror")
    verb.add_argument("digest", help="as shown by `list`; no cluster may need it, not even for a rollback")
    verb.set_defaults(run=_remove)


def _build(arguments: argparse.Namespace) -> int:
    from llmkeep.bundle.build import Keys  # the resolvers: not for `verify`
    from llmkeep.image.build import build

    made = build(
        arguments.bundle,
        arguments.out,
        arguments.variant,
        Keys(arguments.keys),
        arguments.passphrase_file,
    )
    print(f"{arguments.out}: {_described(made)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    highest = manifest.highest_serial(arguments.places.image_serial)
    print(f"{arguments.image}: {_described(record.verify(arguments.image, arguments.keyring, highest))}")
    return 0


def _add(arguments: argparse.Namespace) -> int:
    made = served.add(arguments.places, arguments.image, arguments.keyring, arguments.allow_older)
    print(f"{arguments.places.images}: {_described(made)}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    for made in served.listed(arguments.places, arguments.keyring):
        print(_described(made))
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    served.remove(arguments.places, arguments.digest)
    return 0


def _described(made: Record) -> str:
    size = sum(layer.size for layer in made.layers) / 1e6
    what = f"{made.name} ({made.variant}) of bundle {made.serial}, {len(made.layers)} layers, {size:.0f} MB"
    return f"{what}, expires {made.expires}, signed by {made.signer}: {made.digest}"
