# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0
"""Keeps a valid access token of Cable for all threads of a program."""

import email.utils
import logging
import os
import random
import threading
import time

import hvac
import requests

# Seconds to wait after a failed read, unless the response has Retry-After; after
# an error that a retry cannot help, such as 403; and at most.
RETRY_WAIT = 5
REFUSED_WAIT = 60
LONGEST_WAIT = 600

log = logging.getLogger(__name__)


class TokenSource:
    """Reads tokens from a path of Vault, at VAULT_ADDR with VAULT_TOKEN.

    VAULT_NAMESPACE and VAULT_CACERT are used, too. It reads in the background,
    one request at a time: the next token when two thirds of the lease have
    passed, or without a lease after ttl. If that fails, the current token is
    used until its lease ends. A process that is forked reads for itself.
    """

    def __init__(self, path="cable/creds/reports"):
        self._path = path
        self._vault = os.environ["VAULT_ADDR"], os.environ["VAULT_TOKEN"]
        self._namespace = os.environ.get("VAULT_NAMESPACE")
        self._secret, self._valid_until, self._next_read = None, now(), now()
        self._start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start)

    def _start(self):
        """Makes the parts that a forked process does not share with its parent."""
        # It sends each request once, and reads VAULT_CACERT.
        self._client = hvac.Client(*self._vault, namespace=self._namespace)
        self._client.session.hooks["response"].append(self._note)
        self._changed = threading.Condition()
        self._reading, self._error = False, None

    def token(self):
        """Returns the current token and its expires_at.

        Without a valid token, it waits for the next read that succeeds, or
        raises the error if a retry cannot help.
        """
        with self._changed:
            while True:
                if not self._reading and passed(self._next_read):
                    threading.Thread(target=self._read, daemon=True).start()
                    self._reading, self._error = True, None
                if not passed(self._valid_until):
                    return self._secret["token"], self._secret["expires_at"]
                if self._error:
                    raise self._error
                self._changed.wait(1)  # a longer wait would stand still while the machine is suspended

    def _read(self):
        """Sends one request, and notes its result."""
        start, secret, lease, error, wait = now(), None, 0, None, REFUSED_WAIT
        self._status, self._retry_after = None, None
        try:
            response = self._client.read(self._path) or {"data": {}}
            lease = response.get("lease_duration", 0)
            wait = lease * random.uniform(0.57, 0.67)
            if not lease:  # ttl is when to read again, and at most three quarters of the lease that there would be
                wait = response["data"].get("ttl", 0)
                lease = wait * 4 / 3
            if not response["data"].get("token") or lease <= 0:
                raise LookupError(f"{self._path} has no token with a lease or a ttl")
            secret = response["data"]
        except Exception as e:
            passes = self._passes(e)
            wait = retry_after(self._retry_after, RETRY_WAIT if passes else REFUSED_WAIT) * random.uniform(1, 1.1)
            log.warning("reading %s failed, next try in %.0f s: %s", self._path, wait, e)
            error = None if passes else e
        finally:  # whatever happened, the callers of token() look again
            with self._changed:
                if secret:
                    self._secret, self._valid_until = secret, later(start, lease)
                    self._next_read = later(start, wait)
                else:
                    self._error, self._next_read = error, later(now(), wait)
                self._reading = False
                self._changed.notify_all()

    def _note(self, response, *_args, **_kwargs):
        self._status, self._retry_after = response.status_code, response.headers.get("Retry-After")

    def _passes(self, error):
        """Reports whether the same request may succeed later."""
        if isinstance(error, requests.RequestException):  # there is no response, or a part of one
            refused = isinstance(error, requests.exceptions.SSLError) and "EOF" not in str(error)
            return not refused and not isinstance(error, ValueError)  # such as a malformed VAULT_ADDR
        return self._status is not None and (self._status == 429 or self._status >= 500)


def now():
    """A moment by two clocks.

    The monotonic clock stands still while the machine is suspended, and the
    wall clock can be set back. So a moment has passed if it has by one of them.
    """
    return time.monotonic(), time.time()


def later(moment, seconds):
    return tuple(clock + seconds for clock in moment)


def passed(moment):
    return any(clock >= then for clock, then in zip(now(), moment))


def retry_after(header, default):
    """Returns the seconds that a Retry-After header asks for, as a number or as a date of 29 characters.

    The header may stand there twice, joined with a comma.
    """
    try:
        seconds = float(header.partition(",")[0])
    except Exception:
        try:
            seconds = email.utils.parsedate_to_datetime(header[:29]).timestamp() - time.time()
        except Exception:
            seconds = 0
    return min(seconds, LONGEST_WAIT) if seconds > 0 else default
