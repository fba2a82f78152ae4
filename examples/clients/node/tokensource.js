// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

import { readFileSync } from 'node:fs';
import http from 'node:http';
import https from 'node:https';
import { setTimeout as sleep } from 'node:timers/promises';

// Milliseconds: to wait after a failed read, unless the response has Retry-After;
// after an error that a retry cannot help, such as 403; at most; and for a response.
const RETRY_WAIT = 5_000;
const REFUSED_WAIT = 60_000;
const LONGEST_WAIT = 600_000;
const TIMEOUT = 30_000;

// A moment by two clocks. The monotonic clock stands still while the machine is
// suspended, and the wall clock can be set back. So a moment has passed if it has
// by one of them.
const now = () => [performance.now(), Date.now()];
const later = (moment, wait) => moment.map((clock) => clock + wait);
const passed = (moment) => now().some((clock, i) => clock >= moment[i]);
const between = (low, high) => low + Math.random() * (high - low);

// Keeps a valid access token of Cable for a whole program. It reads from a path
// of Vault, at VAULT_ADDR with VAULT_TOKEN, and VAULT_NAMESPACE and VAULT_CACERT
// if they are set. It reads in the background, one request at a time: the next
// token when two thirds of the lease have passed, or without a lease after ttl. If
// that fails, the current token is used until its lease ends.
export class TokenSource {
  #path;
  #url;
  #options;
  #data;
  #validUntil = now();
  #nextRead = now();
  #reading;
  #error;

  constructor(path = 'cable/creds/reports') {
    const { VAULT_ADDR, VAULT_TOKEN, VAULT_NAMESPACE, VAULT_CACERT } = process.env;
    this.#path = path;
    this.#url = new URL(`${VAULT_ADDR?.replace(/\/+$/, '')}/v1/${path}`);
    this.#options = {
      agent: false, // a connection for each read
      ca: VAULT_CACERT ? readFileSync(VAULT_CACERT) : undefined,
      headers: {
        'X-Vault-Request': 'true',
        'X-Vault-Token': VAULT_TOKEN,
        ...(VAULT_NAMESPACE && { 'X-Vault-Namespace': VAULT_NAMESPACE }),
      },
    };
  }

  // Resolves to the current { token, expires_at }. Without a valid token, it waits
  // for the next read that succeeds, or rejects if a retry cannot help, such as
  // after a 403.
  async token() {
    for (;;) {
      if (!this.#reading && passed(this.#nextRead)) {
        this.#error = undefined;
        this.#reading = this.#read().finally(() => { this.#reading = undefined; });
      }
      if (!passed(this.#validUntil)) return this.#data;
      if (this.#error) throw this.#error;
      await (this.#reading ?? sleep(1000)); // a longer wait would stand still while the machine is suspended
    }
  }

  // Sends one request, and notes its result. It never rejects.
  async #read() {
    const start = now();
    let response;
    try {
      response = await this.#get();
      if (response.status !== 200) throw new Error(`HTTP ${response.status} ${response.body.slice(0, 500)}`);
      const { data, lease_duration } = parse(response.body);
      // Without a lease, ttl is when to read again, and at most three quarters of the lease that there would be.
      const lease = 1000 * (lease_duration || (data?.ttl * 4) / 3);
      if (!data?.token || !(lease > 0)) throw new Error('the response has no token with a lease or a ttl');
      this.#data = data;
      this.#validUntil = later(start, lease);
      this.#nextRead = later(start, lease_duration ? lease * between(0.57, 0.67) : data.ttl * 1000);
    } catch (error) {
      const passes = response ? response.status === 429 || response.status >= 500 : isNetwork(error);
      const wait = retryAfter(response?.retryAfter, passes ? RETRY_WAIT : REFUSED_WAIT) * between(1, 1.1);
      console.warn(`reading ${this.#path} failed, next try in ${Math.round(wait / 1000)} s: ${error.message}`);
      if (!passes) this.#error = new Error(`reading ${this.#path}: ${error.message}`);
      this.#nextRead = later(now(), wait);
    }
  }

  async #get() {
    const { get } = this.#url.protocol === 'https:' ? https : http;
    const response = await new Promise((resolve, reject) => {
      get(this.#url, { ...this.#options, signal: AbortSignal.timeout(TIMEOUT) }, resolve).on('error', reject);
    });
    let body = '';
    for await (const chunk of response.setEncoding('utf8')) body += chunk;
    return { status: response.statusCode, retryAfter: response.headers['retry-after'], body };
  }
}

// Returns the JSON in body. JSON.parse's own error would show a part of it.
function parse(body) {
  try {
    return JSON.parse(body) ?? {};
  } catch {
    return {};
  }
}

// Reports whether an error is of the network, so that it may pass. Errors of TLS,
// such as that of a certificate, name no system call, or are EPROTO.
function isNetwork({ name, code, syscall }) {
  if (code === 'ECONNRESET' || name === 'AbortError' || name === 'TimeoutError') return true;
  return syscall !== undefined && code !== 'EPROTO';
}

// Returns the milliseconds that a Retry-After header asks for, in seconds or as a
// date of 29 characters. A proxy may have joined two of them with a comma.
function retryAfter(header = '', wait) {
  const [seconds] = header.split(',');
  const asked = /^\d+$/.test(seconds) ? seconds * 1000 : Date.parse(header.slice(0, 29)) - Date.now();
  return asked > 0 ? Math.min(asked, LONGEST_WAIT) : wait;
}
