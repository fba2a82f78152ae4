// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// An application that uses Cable's access tokens. Copy tokensource.js.
import { setTimeout as sleep } from 'node:timers/promises';
import { TokenSource } from './tokensource.js';

const tokens = new TokenSource();
for (;;) {
  const { token, expires_at } = await tokens.token();
  void token; // goes into the Authorization header of a request to Cable
  console.log('have a token that is valid until', expires_at);
  await sleep(1000);
}
