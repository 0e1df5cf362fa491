"""TLS for what uvicorn serves: version 1.3 and nothing older."""

import ssl

import uvicorn

from shared_models.errors import IdentityError


def load_tls(config: uvicorn.Config) -> uvicorn.Config:
    """Load a server's configuration; where it has a certificate, with TLS 1.3 as the lowest version.

    Raises:
        IdentityError: A TLS file cannot be used.
    """
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise IdentityError(f"the TLS files cannot be used: {error}", hint="Check [tls] in the settings.") from None
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return config
