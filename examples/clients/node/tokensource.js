// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

import { setTimeout as sleep } from 'node:timers/promises';
import vault from 'node-vault';

// Milliseconds to wait after a failed read. node-vault does not show Retry-After.
const RETRY_WAIT = 5_000;
const RATE_LIMITED_WAIT = 30_000;

const now = () => performance.now();
const between = (low, high) => low + Math.random() * (high - low);

// Keeps a valid access token of Cable for a whole program. It reads from a path
// of Vault, at VAULT_ADDR with VAULT_TOKEN, in the background, one request at a
// time: the next token when two thirds of the lease have passed. If that fails,
// the current token is used until its lease ends.
export class TokenSource {
  #client = vault({ rpDefaults: { timeout: 30_000 } }); // sends each request once
  #path;
  #data;
  #validUntil = 0;
  #nextRead = 0;
  #reading;

  constructor(path = 'cable/creds/reports') {
    this.#path = path;
  }

  // Resolves to the current { token, expires_at }. Without a valid token, it waits
  // for the next read that succeeds, or rejects if a retry cannot help, such as
  // after a 403.
  async token() {
    for (;;) {
      if (now() >= this.#nextRead) {
        this.#reading ??= this.#read().finally(() => { this.#reading = undefined; });
      }
      if (now() < this.#validUntil) return this.#data;
      await (this.#reading ?? sleep(Math.max(1, this.#nextRead - now())));
    }
  }

  async #read() {
    const start = now();
    try {
      const response = await this.#client.read(this.#path);
      const lease = response.lease_duration * 1000;
      this.#data = response.data;
      this.#validUntil = start + lease;
      this.#nextRead = start + lease * between(0.57, 0.67);
    } catch (error) {
      const status = error.response?.statusCode;
      const passes = status === undefined || status === 429 || status >= 500;
      if (!passes && start >= this.#validUntil) throw error;
      this.#nextRead = now() + (status === 429 ? RATE_LIMITED_WAIT : RETRY_WAIT) * between(1, 1.1);
    }
  }
}
