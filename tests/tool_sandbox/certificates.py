"""A certificate authority of a test's own."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tool_sandbox.config import TlsFiles


class Authority:
    """A CA of the test's own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(self._subject, self._key.public_key())
        self._write("ca", builder.add_extension(x509.BasicConstraints(True, None), critical=True))

    def issue(self, name: str, host: str, *, days: int = 1) -> TlsFiles:
        """Certificate, key and CA for `host`, valid until so many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(subject, key.public_key(), days)
        self._write(name, builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self._path(name, "key").write_bytes(private)
        files = {"cert": self._path(name, "pem"), "key": self._path(name, "key"), "ca": self._path("ca", "pem")}
        return TlsFiles(**{field: str(path) for field, path in files.items()})

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int = 1) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._subject).public_key(key)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - timedelta(days=9)).not_valid_after(now + timedelta(days=days))

    def _write(self, name: str, builder: x509.CertificateBuilder) -> None:
        signed = builder.sign(self._key, hashes.SHA256())
        self._path(name, "pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def _path(self, name: str, kind: str) -> Path:
        return self._folder / f"{self._name}-{name}.{kind}"
