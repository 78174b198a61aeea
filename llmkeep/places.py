"""Paths of the control node's keys and of files made with them."""

from dataclasses import dataclass
from pathlib import Path

# Names that the private keys are sealed under, and of their files.
ISSUING_KEY = "llmkeep.issuing-key"
POLICY_KEY = "llmkeep.policy-key"
PUBLISH_KEY = "llmkeep.publish-key"
BACKUP_PASSWORD = "llmkeep.backup-password"  # noqa: S105 a name


@dataclass(frozen=True)
class Places:
    """Paths below `root`, which is / except in tests."""

    root: Path = Path("/")

    def sealed(self, name: str) -> Path:
        """The file of a credential that is encrypted to this host."""
        return self.root / "etc/credstore.encrypted" / name

    @property
    def logs_url(self) -> Path:
        """Address of Elasticsearch; role elasticsearch writes it."""
        return self.root / "etc/llmkeep/logs.url"

    @property
    def logs_sources(self) -> Path:
        """Last parts of the streams' names, one for each host whose logs are kept; role elasticsearch writes it."""
        return self.root / "etc/llmkeep/logs.sources"

    @property
    def logs_checked(self) -> Path:
        """The result of the last `llmkeep logs check --record`."""
        return self.root / "var/lib/llmkeep/logs-check.json"

    @property
    def host_certificate(self) -> Path:
        return self.root / "etc/llmkeep/pki/host.pem"

    @property
    def host_key(self) -> Path:
        return self.root / "etc/llmkeep/pki/host.key"

    # ---------------------------------------------------------------- certificate authority
    @property
    def root_certificate(self) -> Path:
        return self.root / "etc/llmkeep/pki/root.pem"

    @property
    def issuing_certificate(self) -> Path:
        return self.root / "etc/llmkeep/pki/issuing.pem"

    @property
    def issuing_key(self) -> Path:
        return self.sealed(ISSUING_KEY)

    @property
    def issuing_hsm(self) -> Path:
        """Location of the issuing key in the HSM; read only if there is no sealed key."""
        return self.root / "etc/llmkeep/pki/issuing-hsm.json"

    @property
    def root_key(self) -> Path:
        return self.root / "var/lib/llmkeep/handout/root-key.cms"

    @property
    def issued(self) -> Path:
        return self.root / "var/lib/llmkeep/pki/issued.jsonl"

    @property
    def revoked(self) -> Path:
        """The record of all revocations and reinstatements."""
        return self.root / "var/lib/llmkeep/pki/revoked.jsonl"

    @property
    def root_list(self) -> Path:
        """The root's revocation list, signed together with the root certificate."""
        return self.root / "etc/llmkeep/pki/root.crl"

    @property
    def revocation_list(self) -> Path:
        """The file for hosts: revoked names, the issuing CA's list and the root's."""
        return self.root / "var/lib/llmkeep/pki/crl.pem"

    @property
    def revoked_probe(self) -> Path:
        """A certificate that was revoked from the start, and its key: listeners must refuse it."""
        return self.root / "var/lib/llmkeep/pki/revoked.pem"

    def edge(self, host: str) -> Path:
        """The request for an edge's public names, and the certificate of another CA that was installed for it."""
        return self.root / f"var/lib/llmkeep/pki/edges/{host}.json"

    def edge_request(self, host: str) -> Path:
        """That request, for the operator to collect."""
        return self.root / f"var/lib/llmkeep/handout/edge-{host}.csr"

    # ---------------------------------------------------------------- policy
    @property
    def policy_key(self) -> Path:
        return self.sealed(POLICY_KEY)

    @property
    def policy_public(self) -> Path:
        return self.root / "etc/llmkeep/policy/policy.pem"

    @property
    def policy_source(self) -> Path:
        """The estate's own source, if it has one."""
        return self.root / "etc/llmkeep/policy/source"

    @property
    def policy_bundle(self) -> Path:
        return self.root / "var/lib/llmkeep/policy/bundle.tar.gz"

    @property
    def verdicts(self) -> Path:
        """Verdicts on experiments for the operator pages; role operator_page copies them."""
        return self.root / "etc/llmkeep/verdicts"

    @property
    def break_glass(self) -> Path:
        """The record of all break-glass tokens."""
        return self.root / "var/lib/llmkeep/policy/break-glass.jsonl"

    # ---------------------------------------------------------------- bundles
    @property
    def bundles(self) -> Path:
        """Bundles installed by bootstrap, by serial."""
        return self.root / "srv/llmkeep/bundle"

    @property
    def bundle_keyring(self) -> Path:
        """The keyring whose bundles are accepted here; bootstrap writes it."""
        return self.root / "etc/apt/keyrings/llmkeep.pgp"

    @property
    def bundle_serial(self) -> Path:
        """The highest serial that was ever accepted here; bootstrap writes it."""
        return self.root / "var/lib/llmkeep/serial"

    # ---------------------------------------------------------------- releases
    @property
    def publish_key(self) -> Path:
        return self.sealed(PUBLISH_KEY)

    @property
    def publish_public(self) -> Path:
        return self.root / "etc/llmkeep/publish/keyring.pgp"

    @property
    def publish_serial(self) -> Path:
        """The highest serial that was ever issued."""
        return self.root / "var/lib/llmkeep/publish/serial"

    @property
    def publish_signed(self) -> Path:
        """The record of all signatures."""
        return self.root / "var/lib/llmkeep/publish/signed.jsonl"

    def publish_seen(self, name: str) -> Path:
        """The highest serial of this release that was ever accepted here."""
        return self.root / "var/lib/llmkeep/publish/seen" / name

    @property
    def candidates(self) -> Path:
        """Models fetched from training hosts, to be signed; only root can read them."""
        return self.root / "srv/llmkeep/candidates"

    @property
    def releases(self) -> Path:
        """Releases that the mirror serves."""
        return self.root / "srv/llmkeep/releases"

    @property
    def images(self) -> Path:
        """Container images that the mirror serves."""
        return self.root / "srv/llmkeep/images"

    @property
    def image_serial(self) -> Path:
        """The serial of the last image accepted here: the highest, unless an operator rolled back."""
        return self.root / "var/lib/llmkeep/image-serial"

    # ---------------------------------------------------------------- what is kept of hosts
    @property
    def witness(self) -> Path:
        """The heads of hosts' records, one folder per host."""
        return self.root / "var/lib/llmkeep/witness"

    @property
    def reports(self) -> Path:
        """Signed reports on the controls of standards."""
        return self.root / "var/lib/llmkeep/reports"

    @property
    def waivers(self) -> Path:
        """Files of vulnerabilities that an owner accepts until a given day."""
        return self.root / "etc/llmkeep/waivers"

    @property
    def sboms(self) -> Path:
        """Signed archives of the software installed on hosts."""
        return self.root / "var/lib/llmkeep/sboms"

    @property
    def volumes(self) -> Path:
        """Register, recovery keys and headers of hosts' volumes."""
        return self.root / "var/lib/llmkeep/storage"

    @property
    def replaced(self) -> Path:
        """The same for replaced machines."""
        return self.root / "var/lib/llmkeep/replaced"

    # ---------------------------------------------------------------- backup
    @property
    def backup_settings(self) -> Path:
        """Location, additional paths and retention of backups; role backup writes it."""
        return self.root / "etc/llmkeep/backup.json"

    @property
    def backup_password(self) -> Path:
        return self.sealed(BACKUP_PASSWORD)

    @property
    def backup_secrets(self) -> Path:
        """The secrets sealed to this host, encrypted to the escrow certificate."""
        return self.root / "var/lib/llmkeep/backup/secrets.cms"

    @property
    def backup_description(self) -> Path:
        """The description of the last backup."""
        return self.root / "var/lib/llmkeep/backup/description.json"

    @property
    def backup_begun(self) -> Path:
        """The location of the created repository; if it is missing there, it is not created again."""
        return self.root / "var/lib/llmkeep/backup/repository"

    @property
    def backup_verified(self) -> Path:
        """The last backup that was verified in place."""
        return self.root / "var/lib/llmkeep/backup-verified.json"

    @property
    def restoring(self) -> Path:
        """The backup that is being restored here; exists while a restore is incomplete."""
        return self.root / "var/lib/llmkeep/restoring.json"

    @property
    def escrow_certificate(self) -> Path:
        """The escrow certificate from the bundle in use."""
        return self.bundles / "current/escrow.pem"
