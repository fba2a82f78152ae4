# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0
"""An application that uses Cable's access tokens. Copy tokensource.py."""

import time

from tokensource import TokenSource

tokens = TokenSource()
while True:
    token, expires_at = tokens.token()  # goes into the Authorization header of a request to Cable
    print("have a token that is valid until", expires_at, flush=True)
    time.sleep(1)
