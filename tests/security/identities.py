"""A certificate authority and a log as Sigstore's, made on the spot: identities without network.

`Authority.sign` gives a bundle as Sigstore's servers would: a certificate of the identity with the
certificate log's timestamp, and an entry of a transparency log of one entry. `Authority.trust` is
what a reader is given to check it by.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import struct
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ISSUER_OID = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
TIMESTAMPS_OID = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
ORIGIN = "log.example"
_MINUTE = datetime.timedelta(minutes=1)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _info(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _key_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(_info(key)).digest()


def _signed(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


class Authority:
    """Keys of a root, of its log of certificates, and of its log of signatures."""

    def __init__(self) -> None:
        """Makes them."""
        self._root, self._certificates, self._log = (
            ec.generate_private_key(ec.SECP256R1()) for _ in range(3)
        )
        self._now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")])
        self._root_certificate = (
            self._builder(self._root, self._name, 60 * _MINUTE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._root, hashes.SHA256())
        )

    def trust(self) -> dict[str, Any]:
        """Returns the JSON object of a trust configuration with this authority alone."""
        valid = {"start": (self._now - 60 * _MINUTE).isoformat().replace("+00:00", "Z")}

        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            public = {
                "rawBytes": _b64(_info(key)),
                "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                "validFor": valid,
            }
            return {
                "baseUrl": f"https://{ORIGIN}", "hashAlgorithm": "SHA2_256",
                "publicKey": public, "logId": {"keyId": _b64(_key_id(key))},
            }  # fmt: skip

        chain = [{"rawBytes": _b64(self._root_certificate.public_bytes(Encoding.DER))}]
        authority = {
            "subject": {"organization": "example", "commonName": "root"},
            "uri": "https://ca.example", "certChain": {"certificates": chain}, "validFor": valid,
        }  # fmt: skip
        return {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [log(self._log)], "ctlogs": [log(self._certificates)],
                "certificateAuthorities": [authority], "timestampAuthorities": [],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [], "oidcUrls": [], "rekorTlogUrls": [], "tsaUrls": [],
                "rekorTlogConfig": {"selector": "ANY"}, "tsaConfig": {"selector": "ANY"},
            },
        }  # fmt: skip

    def sign(self, statement: bytes, kind: str, identity: str, issuer: str) -> dict[str, Any]:
        """Returns a bundle: `statement` of type `kind`, signed by a key of the identity."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certify(key, identity, issuer)
        signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(statement), statement)
        signature = _b64(_signed(key, signed))
        envelope = {
            "payload": _b64(statement), "payloadType": kind, "signatures": [{"sig": signature}],
        }  # fmt: skip
        raw = _b64(certificate.public_bytes(Encoding.DER))
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "certificate": {"rawBytes": raw},
                "tlogEntries": [self._entry(statement, envelope, certificate)],
            },
            "dsseEnvelope": envelope,
        }

    def _builder(
        self, key: ec.EllipticCurvePrivateKey, name: x509.Name, before: datetime.timedelta
    ) -> x509.CertificateBuilder:
        root = self._root.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - before)
            .not_valid_after(self._now + 10 * _MINUTE)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root), False)
        )

    def _certify(
        self, key: ec.EllipticCurvePrivateKey, identity: str, issuer: str
    ) -> x509.Certificate:
        """Returns a certificate of an identity with one timestamp of the log of certificates."""
        builder = (
            self._builder(key, x509.Name([]), 10 * _MINUTE)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False)
            .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(identity)]), True)
            .add_extension(x509.UnrecognizedExtension(ISSUER_OID, issuer.encode()), False)
        )
        # The timestamp covers the certificate without it (RFC 6962).
        body = builder.sign(self._root, hashes.SHA256()).tbs_certificate_bytes
        milliseconds = int(self._now.timestamp() * 1000)
        entry = _key_id(self._root) + struct.pack("!I", len(body))[1:] + body
        signature = _signed(
            self._certificates, struct.pack("!BBQH", 0, 0, milliseconds, 1) + entry + bytes(2)
        )
        timestamp = b"\0" + _key_id(self._certificates) + struct.pack("!QH", milliseconds, 0)
        timestamp += b"\4\3" + struct.pack("!H", len(signature)) + signature
        sized = struct.pack("!HH", len(timestamp) + 2, len(timestamp)) + timestamp
        assert len(sized) < 128  # one byte of DER holds the length
        extension = x509.UnrecognizedExtension(TIMESTAMPS_OID, bytes([4, len(sized)]) + sized)
        return builder.add_extension(extension, False).sign(self._root, hashes.SHA256())

    def _entry(
        self, statement: bytes, envelope: dict[str, Any], certificate: x509.Certificate
    ) -> dict[str, Any]:
        """Returns the entry of a signature in a log that holds nothing else."""
        verifier = _b64(certificate.public_bytes(Encoding.PEM))
        spec = {
            "envelopeHash": _sha256(json.dumps(envelope).encode()),
            "payloadHash": _sha256(statement),
            "signatures": [{"signature": envelope["signatures"][0]["sig"], "verifier": verifier}],
        }
        body = json.dumps({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec}).encode()
        root = hashlib.sha256(b"\0" + body).digest()
        note = f"{ORIGIN}\n1\n{_b64(root)}\n"
        mark = _b64(_key_id(self._log)[:4] + _signed(self._log, note.encode()))
        seconds = int(self._now.timestamp())
        promised = {
            "body": _b64(body), "integratedTime": seconds,
            "logID": _key_id(self._log).hex(), "logIndex": 0,
        }  # fmt: skip
        promise = json.dumps(promised, separators=(",", ":"), sort_keys=True).encode()
        return {
            "logIndex": "0", "logId": {"keyId": _b64(_key_id(self._log))},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"}, "integratedTime": str(seconds),
            "inclusionPromise": {"signedEntryTimestamp": _b64(_signed(self._log, promise))},
            "inclusionProof": {
                "logIndex": "0", "rootHash": _b64(root), "treeSize": "1", "hashes": [],
                "checkpoint": {"envelope": f"{note}\n\N{EM DASH} {ORIGIN} {mark}\n"},
            },
            "canonicalizedBody": _b64(body),
        }  # fmt: skip


def _sha256(data: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates,
        crl_sign=signs_certificates, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
