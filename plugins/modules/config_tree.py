#!/usr/bin/python
"""State module: all files of a role, in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: config_tree
short_description: Install all files of a role in one call, validated, atomically, all or nothing
description:
  - Manages system users and groups, directories, files and links. Each entry has its own C(state).
  - An item of C(directories), C(files) or C(links) may itself be a list of entries, so that an expression can produce several.
  - Each file is validated before any file is replaced. C(validate) of the whole call runs once all files are in place.
    If validation or any other step fails, the previous state is restored.
  - The hashes of files as they were written are kept in C(/var/lib/llmkeep-written/sha256.json), by which a later drift is seen.
  - Check mode does not validate, since a validator may depend on files that the run has not written.
  - An action plugin of the same name renders C(template) on the control node into C(content), unless the file is to be absent.
author: [llmkeep contributors (@llmkeep)]
options:
  sysusers:
    description: A sysusers.d file, installed first; C(systemd-sysusers) creates the accounts in it.
    type: dict
    suboptions:
      dest: {description: Path of the file., type: path, required: true}
      content: {description: Its content., type: str, required: true}
      state: &state
        description: >-
          C(absent) removes it. Accounts are kept, since they may still own files; a directory is kept while it is not empty.
        type: str
        choices: [present, absent]
        default: present
  directories:
    description: Directories to create. In an C(exclusive) directory, files that this call does not name are removed.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute path., type: path, required: true}
      owner: {description: User., type: str, default: root}
      group: {description: Group., type: str, default: root}
      mode: {description: Octal mode., type: str, default: "0755"}
      exclusive: {description: Remove all other files in it., type: bool, default: false}
      state: *state
  files:
    description: Files to install.
    type: list
    elements: dict
    default: []
    suboptions:
      dest: {description: Absolute path., type: path, required: true}
      template: {description: Template in the role's C(templates) folder., type: str}
      vars: {description: Variables for the template in addition to the play's., type: dict}
      content: {description: "Content of the file, instead of C(template).", type: str}
      owner: {description: User., type: str, default: root}
      group: {description: Group., type: str, default: root}
      mode: {description: Octal mode., type: str, default: "0644"}
      validate: {description: Command; C(%s) becomes the new file's path., type: list, elements: str}
      block:
        description: >-
          Name of a block. Only the lines between C(# BEGIN NAME) and C(# END NAME) are managed; the rest of the file
          is left to other programs.
        type: str
      secret: {description: Keep the content out of every output., type: bool, default: false}
      state: *state
  secret_contents:
    description: Contents of the secret files by path. Set by the action plugin.
    type: dict
    default: {}
  links:
    description: Symbolic links.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Path of the link., type: path, required: true}
      target: {description: Target of the link; required with C(state=present)., type: str}
      state: *state
  validate:
    description: A program that validates the whole tree once it is installed, for example C([nginx, -t]).
    type: list
    elements: str
    default: []
  read:
    description: Files whose contents are returned, for example the host's certificate.
    type: list
    elements: path
    default: []
  units:
    description: >-
      Units that read these files. A change leaves a marker in C(/run/llmkeep/pending) until
      M(llmkeep.estate.systemd_units) reloads or restarts them, so that a run that ends before its handlers loses nothing.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Configure redis
  llmkeep.estate.config_tree:
    directories: [{path: /etc/redis, group: redis, mode: "0750"}]
    files:
      - {dest: /etc/redis/redis.conf, template: redis.conf.j2, group: redis, mode: "0640"}
      - {dest: /etc/nftables.d/input-redis.nft, state: absent}
  notify: restart redis
"""

RETURN = r"""
read: {description: "Contents of the files in I(read) by path; empty for a missing file.", returned: success, type: dict}
changes: {description: "Changes that were or would be made, one line each.", returned: always, type: list, elements: str}
"""

import grp
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config.tree import (
    Refused,
    Tree,
    put_directory,
    put_link,
    remove,
    remove_directory,
    run,
    stage,
)

KINDS = ("files", "links", "directories")
WRITTEN = Path("/var/lib/llmkeep-written/sha256.json")


def make_users(tree: Tree, file: dict[str, Any] | None) -> None:
    """Place the sysusers.d file and let systemd make what is missing."""
    if not file:
        return
    if file["state"] == "absent":
        remove(tree, Path(file["dest"]))
        return
    missing = []
    for line in file["content"].splitlines():
        words = line.split()
        if len(words) < 2 or words[0].rstrip("!") not in {"u", "g", "m"}:
            continue
        if words[0].startswith("u"):
            there = atomic.user_id(words[1]) is not None
        elif words[0] == "g":
            there = atomic.group_id(words[1]) is not None
        else:
            there = words[1] in members_of(words[2])
        if not there:
            missing.append(" ".join(words[:3]))
    folder = Path(file["dest"]).parent
    if not folder.is_dir():
        put_directory(tree, {"path": str(folder), "owner": "root", "group": "root", "mode": "0755"})
    stage(tree, [({**file, "owner": "root", "group": "root", "mode": "0644"}, None)])
    if missing:
        for entry in missing:
            tree.note(f"account: {entry}")
        if not tree.check:
            run(["systemd-sysusers", file["dest"]], "accounts")


def members_of(group: str) -> list[str]:
    try:
        return list(grp.getgrnam(group).gr_mem)
    except KeyError:
        return []


def present(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["state"] == "present"]


def absent(entries: list[dict[str, Any]]) -> list[Path]:
    return [Path(entry.get("dest") or entry["path"]) for entry in entries if entry["state"] == "absent"]


def strangers(params: dict[str, Any]) -> list[Path]:
    """What lies in exclusive directories and is in none of this call's files and links."""
    known = {entry.get("dest") or entry["path"] for kind in KINDS for entry in params[kind]}
    paths: list[Path] = []
    for entry in present(params["directories"]):
        folder = Path(entry["path"])
        if entry["exclusive"] and folder.is_dir():
            paths += [
                path for path in sorted(folder.iterdir()) if str(path) not in known and not path.is_dir()
            ]
    return paths


def apply(params: dict[str, Any], check: bool) -> Tree:
    """Bring the host to the tree, or leave it as it was and raise Refused."""
    tree = Tree(check)
    secrets: dict[str, str] = params["secret_contents"]
    for entry in params["files"]:
        if not re.fullmatch(r"0?[0-7]{3,4}", entry["mode"]):
            raise Refused(f"mode {entry['mode']!r} of {entry['dest']} is not octal; write it as '0640'")
    try:
        make_users(tree, params["sysusers"])
        for entry in present(params["directories"]):
            put_directory(tree, entry)
        files = [(entry, secrets.get(entry["dest"])) for entry in present(params["files"])]
        stage(tree, files, params["units"])
        for entry in present(params["links"]):
            put_link(tree, entry)
        for path in absent(params["files"]) + absent(params["links"]) + strangers(params):
            remove(tree, path)
        for path in reversed(absent(params["directories"])):
            remove_directory(tree, path)
        if params["validate"] and tree.changes and not check:
            run(params["validate"], "the whole tree")
    except (Refused, OSError) as problem:
        tree.put_back()
        raise Refused(f"{problem}. Everything was restored.") from problem
    return tree


def note_written(params: dict[str, Any], tree: Tree, file: Path) -> None:
    """Keep the hashes of files as this run leaves them, by which a later drift is seen (role exporters).

    Left out are secrets, files that other programs write to as well, and links. Of modes and owners nothing is kept.
    """
    try:
        known: dict[str, str] = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):  # none yet, or no JSON object: this and later runs fill it again
        known = {}
    gone = {line.removeprefix("removed: ") for line in tree.changes} | {
        *(str(path) for path in absent(params["files"])),
        *(entry["path"] for entry in params["links"]),
    }
    noted = {path: digest for path, digest in known.items() if path not in gone}
    for entry in present(params["files"]):
        if not (entry["secret"] or entry.get("block")):
            noted[entry["dest"]] = hashlib.sha256((entry.get("content") or "").encode()).hexdigest()
    if noted != known:
        file.parent.mkdir(mode=0o755, exist_ok=True)
        text = json.dumps(noted, indent=0, sort_keys=True) + "\n"
        atomic.write_file(file, text.encode(), os.geteuid(), os.getegid(), 0o600)


def main() -> None:
    state = {"state": {"type": "str", "choices": ["present", "absent"], "default": "present"}}
    attributes = {
        "owner": {"type": "str", "default": "root"},
        "group": {"type": "str", "default": "root"},
        **state,
    }
    module = AnsibleModule(
        argument_spec={
            "sysusers": {
                "type": "dict",
                "options": {
                    "dest": {"type": "path", "required": True},
                    "content": {"type": "str", "required": True},
                    **state,
                },
            },
            "directories": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "mode": {"type": "str", "default": "0755"},
                    "exclusive": {"type": "bool", "default": False},
                    **attributes,
                },
            },
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "dest": {"type": "path", "required": True},
                    "template": {"type": "str"},
                    "vars": {"type": "dict"},
                    "content": {"type": "str"},
                    "mode": {"type": "str", "default": "0644"},
                    "validate": {"type": "list", "elements": "str"},
                    "block": {"type": "str"},
                    "secret": {"type": "bool", "default": False},
                    **attributes,
                },
            },
            "secret_contents": {"type": "dict", "default": {}, "no_log": True},
            "links": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"path": {"type": "path", "required": True}, "target": {"type": "str"}, **state},
                "required_if": [("state", "present", ["target"])],
            },
            "validate": {"type": "list", "elements": "str", "default": []},
            "read": {"type": "list", "elements": "path", "default": []},
            "units": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    try:
        tree = apply(module.params, module.check_mode)
        if not module.check_mode:
            note_written(module.params, tree, WRITTEN)
    except Refused as problem:
        module.fail_json(msg=str(problem))
    diff = [
        {"before_header": path, "after_header": path, "before": tree.before[path], "after": tree.after[path]}
        for path in tree.after
    ]
    other = [line for line in tree.changes if not line.startswith("file: ")]
    if other:
        diff.append({"prepared": "\n".join(other) + "\n"})
    read = {name: Path(name).read_text() if Path(name).exists() else "" for name in module.params["read"]}
    module.exit_json(changed=bool(tree.changes), changes=tree.changes, diff=diff, read=read)


if __name__ == "__main__":
    main()
