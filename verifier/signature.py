"""Signatures of containers, made and checked by Sigstore's `model-signing`.

A signature is a file of its own beside the container: a Sigstore bundle (OpenSSF Model Signing)
that holds the sha256 of every file of the folder. README.md and .gitattributes, which hosting
services rewrite, are left out; whatever else a signature leaves out counts as added.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from codecllm.formats.arguments.check import check_arguments
from codecllm.formats.arguments.inputs import check_input
from codecllm.formats.arguments.outputs import check_output
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    LimitError,
    SignatureError,
    UnsupportedEnvironmentError,
    UsageError,
    one_line,
)
from codecllm.formats.files import as_path, fsync_folder
from codecllm.formats.machine import cores
from codecllm.formats.manifest.manifest import MANIFEST_NAME, Manifest
from codecllm.formats.manifest.unlisted import NEVER_LISTED, unlisted_names
from codecllm.verifier.checks.integrity import check_checksums, check_structure
from codecllm.verifier.own_folder import own_folder
from codecllm.verifier.report import Stage

_LEFT_OUT = sorted(NEVER_LISTED - {MANIFEST_NAME})
_SIGNATURE_BYTES = 64 << 20  # some 200 bytes for each file
_KEY_BYTES = 1 << 20
_TRUST_BYTES = 16 << 20


def sign(
    container: str | Path,
    private_key: str | Path,
    signature: str | Path | None = None,
    *,
    password: str | None = None,
) -> Path:
    """Signs a container with a private key.

    Args:
        container: a local folder; its structure and checksums are verified first.
        private_key: PEM file of an elliptic-curve key (P-256, P-384 or P-521).
        signature: file to write, outside the container. None is the folder's name and `.sig`.
        password: of an encrypted key.

    Returns:
        The signature's path.

    Raises:
        UsageError: not such a key, the signature would lie inside a container or replace the key or
            what is no regular file, or the folder holds files that are not part of the container.
        SignatureError: the folder holds what no signature covers: an empty folder, or a link.
        UnsupportedEnvironmentError: `model-signing` is not installed.
        CodecLLMError: the container is damaged.
        OSError: reading or writing failed.
    """
    folder = as_path(container, "container")
    private_key = as_path(private_key, "private_key")
    check_arguments(password=password)
    path = _beside(folder) if signature is None else as_path(signature, "signature")
    check_output(path, "signature", (private_key,))
    library = _library()
    check_input(private_key, "the private key", _KEY_BYTES)
    if _real(path).is_relative_to(_real(folder)):
        raise UsageError("a signature lies outside the container that it signs", file=str(path))
    try:
        config = library.signing.Config().use_elliptic_key_signer(
            # Bytes: cryptography, which gets it, takes no str.
            private_key=private_key,
            password=None if password is None else password.encode(),
        )
    except OSError:
        raise
    except Exception as exc:  # cryptography raises many types
        raise _not_a_key("private", private_key, exc) from exc
    with Container(folder) as opened:
        _require_whole(opened)
        others = [*unlisted_names(folder, opened.manifest), *_hidden_names(folder, opened.manifest)]
    if others:
        raise UsageError(
            "files that are not part of the container would be signed with it: move them elsewhere",
            file=str(folder),
            got=", ".join(ascii(name)[1:-1] for name in others[:5]),
        )
    _check_entries(folder, from_hub=False)
    # In a new folder of this process alone: a link under a name that can be guessed would lead the
    # library's write elsewhere.
    with own_folder(path.parent) as folder_of_ours:
        partial = folder_of_ours / path.name
        config.set_hashing_config(_hashing(library, _LEFT_OUT)).sign(folder, partial)
        with open(partial, "rb") as file:
            # Before the rename, which could otherwise reach the disk before the bytes.
            os.fsync(file.fileno())
        os.replace(partial, path)
    fsync_folder(path.parent)
    return path


@dataclass(frozen=True, slots=True)
class Signer:
    """Who must have signed: the owner of a key, or an identity of Sigstore.

    Attributes:
        public_key: PEM file of a public key.
        identity: what a certificate names: a mail address, or the URI of a workflow.
        issuer: URL of the OpenID Connect issuer that vouched for the identity.
        trust_config: file of Sigstore's trust configuration, with its certificate authorities and
            logs; None fetches that of Sigstore's public servers.
    """

    public_key: str | Path | None = None
    identity: str | None = None
    issuer: str | None = None
    trust_config: str | Path | None = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_arguments(**{field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def is_given(self) -> bool:
        """Whether there is a key or an identity, as `check_signature` needs it.

        Raises:
            UsageError: there is a part of one, or both.
        """
        if (self.identity is None) != (self.issuer is None):
            raise UsageError("an identity goes with its issuer")
        if self.identity is None and self.trust_config is not None:
            raise UsageError("a trust configuration goes with an identity")
        if self.identity is not None and self.public_key is not None:
            raise UsageError("a signature is by a key or by an identity, not by both")
        return self.identity is not None or self.public_key is not None

    def verifier(self) -> Any:
        """Returns the library's check of signatures by this signer, for `check_signature`.

        Raises:
            UsageError: the file holds no public key of an elliptic curve, or no trust
                configuration.
            UnsupportedEnvironmentError: `model-signing` is not installed, or Sigstore's servers
                cannot be reached.
            OSError: reading failed.
        """
        config = _library().verifying.Config()
        if self.public_key is not None:
            check_input(Path(self.public_key), "the public key", _KEY_BYTES)
            try:
                return config.use_elliptic_key_verifier(public_key=self.public_key)
            except OSError:
                raise
            except Exception as exc:  # cryptography raises many types
                raise _not_a_key("public", self.public_key, exc) from exc
        path = None if self.trust_config is None else Path(self.trust_config)
        if path is not None:
            check_input(path, "the trust configuration", _TRUST_BYTES)
        try:
            return config.use_sigstore_verifier(
                identity=self.identity, oidc_issuer=self.issuer, trust_config=path
            )
        except OSError:
            raise
        except Exception as exc:  # of a parser, of cryptography, or of a client of the network
            reason = one_line(exc) or type(exc).__name__
            if path is not None:
                raise UsageError(
                    f"not a trust configuration of Sigstore: {reason}", file=str(path)
                ) from exc
            raise UnsupportedEnvironmentError(
                f"the trust configuration of Sigstore cannot be fetched (a file can be given): "
                f"{reason}"
            ) from exc

    def __str__(self) -> str:
        return "this key" if self.identity is None else f"{self.identity} ({self.issuer})"


def check_signature(
    folder: Path,
    signature: str | Path,
    signer: Signer,
    verifier: Any,
    stage: Stage,
    *,
    from_hub: bool,
) -> None:
    """Checks that a signature is by a signer, and of every file of a container's folder.

    Args:
        folder: the container's folder.
        signature: the signature's file.
        signer: who must have signed.
        verifier: the signer's.
        stage: receives the summary.
        from_hub: whether the folder is one of a Hub cache: its files are then links.

    Raises:
        SignatureError: it is not by this signer, a file differs, is missing, or was added, or the
            signature is no regular file.
        LimitError: the signature has more than 64 MiB.
        OSError: reading failed.
    """
    path = as_path(signature, "signature")
    _check_size(path)
    _check_entries(folder, from_hub=from_hub)
    ignored = list(_LEFT_OUT)
    if _real(path).is_relative_to(_real(folder)):
        ignored.append(str(_real(path).relative_to(_real(folder))))
    verifier.set_hashing_config(_hashing(_library(), ignored).set_allow_symlinks(from_hub))
    try:
        verifier.verify(folder, path)
    except OSError:
        raise
    except Exception as exc:  # of the library, of cryptography, or of a parser
        raise SignatureError(
            f"the signature does not hold: {one_line(exc) or type(exc).__name__}", file=str(path)
        ) from exc
    stage.summary = f"every file is as it was signed by {signer}"


def _library() -> Any:
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as exc:
        raise UnsupportedEnvironmentError(
            "signatures need model-signing: pip install 'codecllm[sign]'"
        ) from exc
    return model_signing


def _hashing(library: Any, ignored: list[str]) -> Any:
    """Returns how files are hashed: each as a whole, by sha256, those of git too."""

    class Config(library.hashing.Config):  # type: ignore[misc]
        def add_ignored_paths(self, **_: Any) -> None:
            """Adds nothing: the library asks for what a signature says it left out.

            The library leaves out .git, .github and .gitignore unless it is told, and files there
            could be added to a signed container.
            """

    config = Config().use_file_serialization(hashing_algorithm="sha256")
    return config.set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _check_size(signature: Path) -> None:
    """Refuses what is no regular file, before it is opened: a pipe would never end."""
    state = signature.stat()
    if not stat.S_ISREG(state.st_mode):
        raise SignatureError("the signature is no regular file", file=str(signature))
    if state.st_size > _SIGNATURE_BYTES:
        raise LimitError(
            "the signature is too large",
            file=str(signature),
            got=state.st_size,
            expected=f"at most {_SIGNATURE_BYTES} bytes",
        )


def _check_entries(folder: Path, *, from_hub: bool) -> None:
    """Refuses what no signature covers: links to folders, empty folders, and a card that is none.

    Only files are hashed, and the library follows no link to a folder.

    Args:
        folder: the container's.
        from_hub: whether links to files are fine.

    Raises:
        SignatureError: there is such an entry; the first is named.
    """
    for place, folders, files in os.walk(folder, onerror=_raise):
        if not folders and not files:
            raise _not_covered("an empty folder", folder, Path(place))
        for name in folders:
            if (Path(place) / name).is_symlink():
                raise _not_covered("a link to a folder", folder, Path(place) / name)
    for name in _LEFT_OUT:
        path = folder / name
        if path.is_symlink() and not from_hub:
            raise _not_covered("a symlink", folder, path)
        if (path.exists() or path.is_symlink()) and not path.is_file():
            raise _not_covered("what is no regular file", folder, path)


def _not_covered(what: str, folder: Path, path: Path) -> SignatureError:
    name = path.relative_to(folder).as_posix()
    return SignatureError(f"the signature does not cover {what}", file=ascii(name)[1:-1])


def _raise(error: OSError) -> None:
    raise error


def _hidden_names(folder: Path, manifest: Manifest) -> list[str]:
    """Returns unlisted names that begin with a dot, at any depth, but for those of hosts."""
    listed = NEVER_LISTED | {record.name for record in manifest.files}
    names = [path.relative_to(folder).as_posix() for path in folder.rglob(".*")]
    return sorted(
        name
        for name in names
        if name not in listed and not any(one.startswith(f"{name}/") for one in listed)
    )


def _beside(folder: Path) -> Path:
    """Returns the place of a signature where none is given: `out.sig` beside the folder `out`."""
    real = _real(folder)
    if not real.name:
        raise UsageError("there is no place beside this folder: name a signature", file=str(folder))
    return real.with_name(real.name + ".sig")


def _real(path: Path) -> Path:
    """Returns a path without links, but for one that leads to itself: `resolve` fails there."""
    return Path(os.path.realpath(path))


def _not_a_key(kind: str, path: str | Path, exc: Exception) -> UsageError:
    return UsageError(
        f"not the {kind} key of an elliptic curve (PEM), or its password is another: "
        f"{one_line(exc)}",
        file=str(path),
    )


def _require_whole(container: Container) -> None:
    """Raises the first fault of structure or checksums: what is damaged is not signed."""
    stage = Stage("checksums")
    check_structure(container, stage, [])
    check_checksums(container, stage, cores(), None)
    if stage.findings:
        raise stage.findings[0].error
