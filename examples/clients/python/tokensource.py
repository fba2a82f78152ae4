# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0
"""Keeps a valid access token of Cable for all threads of a program."""

import os
import random
import threading
import time

import hvac
import requests

# Seconds to wait after a failed read, unless the response has Retry-After; and
# after an error that a retry cannot help, such as 403.
RETRY_WAIT = 5
REFUSED_WAIT = 60


class TokenSource:
    """Reads tokens from a path of Vault, at VAULT_ADDR with VAULT_TOKEN.

    It reads in the background, one request at a time: the next token when two
    thirds of the lease have passed. If that fails, the current token is used
    until its lease ends.
    """

    def __init__(self, path="cable/creds/reports"):
        session = requests.Session()  # sends each request once
        session.hooks["response"].append(self._note)
        self._client = hvac.Client(os.environ["VAULT_ADDR"], os.environ["VAULT_TOKEN"], session=session)
        self._path = path
        self._changed = threading.Condition()
        self._secret, self._valid_until, self._next_read = None, 0.0, 0.0
        self._reading, self._error = False, None

    def token(self):
        """Returns the current token and its expires_at.

        Without a valid token, it waits for the next read that succeeds, or
        raises the error if a retry cannot help.
        """
        with self._changed:
            while True:
                now = time.monotonic()
                if now >= self._next_read and not self._reading:
                    self._reading, self._error = True, None
                    threading.Thread(target=self._read, daemon=True).start()
                if now < self._valid_until:
                    return self._secret["token"], self._secret["expires_at"]
                if self._error:
                    raise self._error
                self._changed.wait(None if self._reading else max(0.0, self._next_read - now))

    def _read(self):
        start = time.monotonic()
        secret, error = None, None
        self._status, self._retry_after = None, None
        try:
            secret = self._client.read(self._path)
            if secret is None:
                raise LookupError(f"Vault has nothing at {self._path}")
        except Exception as e:
            error = e
        with self._changed:
            if error is None:
                lease = secret["lease_duration"]
                self._secret, self._valid_until = secret["data"], start + lease
                self._next_read = start + lease * random.uniform(0.57, 0.67)
            else:
                passes = self._status is None or self._status == 429 or self._status >= 500
                if not passes:
                    self._error = error
                wait = float(self._retry_after or (RETRY_WAIT if passes else REFUSED_WAIT))
                self._next_read = time.monotonic() + wait * random.uniform(1, 1.1)
            self._reading = False
            self._changed.notify_all()

    def _note(self, response, *_args, **_kwargs):
        self._status, self._retry_after = response.status_code, response.headers.get("Retry-After")
