"""AES-256-GCM, as secrets are sealed with it (docs/contract/node-api.md §7).

libsodium is loaded anyway, but has this cipher only for processors with instructions for AES; on others OpenSSL takes
over, which costs 7 MB of memory from the first secret on.
"""

from __future__ import annotations

from nacl.bindings import crypto_aead_aes256gcm_decrypt
from nacl.exceptions import CryptoError, UnavailableError

NONCE_BYTES = 12
TAG_BYTES = 16


def open_sealed(key: bytes, nonce: bytes, sealed: bytes) -> bytes:
    """`sealed` ends with the tag. Raises ValueError when it was sealed with another key or nonce, or is damaged."""
    if len(nonce) != NONCE_BYTES or len(sealed) < TAG_BYTES:
        raise ValueError("nonce or ciphertext has the wrong length")
    try:
        return crypto_aead_aes256gcm_decrypt(sealed, None, nonce, key)
    except UnavailableError:
        return _open_with_openssl(key, nonce, sealed)
    except CryptoError:
        raise ValueError("the tag does not fit") from None


def _open_with_openssl(key: bytes, nonce: bytes, sealed: bytes) -> bytes:
    from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - see above
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

    try:
        return AESGCM(key).decrypt(nonce, sealed, None)
    except InvalidTag:
        raise ValueError("the tag does not fit") from None
