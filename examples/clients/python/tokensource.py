# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0
"""Keeps a valid access token of Cable for all threads of a program."""

import os
import random
import threading
import time

import hvac
import requests

RETRY_WAIT = 5  # seconds after a failed read, unless the response has Retry-After


class TokenSource:
    """Reads tokens from a path of Vault, at VAULT_ADDR with VAULT_TOKEN.

    It reads the next token when two thirds of the lease have passed. If that
    fails, the current token is used until its lease ends.
    """

    def __init__(self, path="cable/creds/reports"):
        session = requests.Session()  # sends each request once
        session.hooks["response"].append(self._note)
        self._client = hvac.Client(os.environ["VAULT_ADDR"], os.environ["VAULT_TOKEN"], session=session)
        self._path = path
        self._lock = threading.Lock()
        self._secret, self._valid_until, self._next_read = None, 0.0, 0.0

    def token(self):
        """Returns the current token and its expires_at.

        Without a valid token, it waits for the next read that succeeds, or
        raises the error if a retry cannot help, such as 403.
        """
        with self._lock:
            while True:
                if time.monotonic() >= self._next_read:
                    self._read()
                if time.monotonic() < self._valid_until:
                    return self._secret["token"], self._secret["expires_at"]
                time.sleep(max(0.0, self._next_read - time.monotonic()))

    def _read(self):
        self._status, self._retry_after = None, None
        start = time.monotonic()
        try:
            response = self._client.read(self._path)
        except Exception:
            passes = self._status is None or self._status == 429 or self._status >= 500
            if not passes and start >= self._valid_until:
                raise
            wait = float(self._retry_after or RETRY_WAIT)
            self._next_read = time.monotonic() + wait * random.uniform(1, 1.1)
            return
        lease = response["lease_duration"]
        self._secret, self._valid_until = response["data"], start + lease
        self._next_read = start + lease * random.uniform(0.57, 0.67)

    def _note(self, response, *_args, **_kwargs):
        self._status, self._retry_after = response.status_code, response.headers.get("Retry-After")
