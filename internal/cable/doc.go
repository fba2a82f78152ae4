// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package cable is a client of Cable's token API, POST /v2/auth/token, which issues short-lived access tokens to the
// holder of a long-lived refresh key. It speaks HTTP/1.1 and JSON and knows nothing of Vault.
//
// Its promise is that a token request makes Cable issue one token at most, and that its error says so if that token may
// exist without having been delivered; see [Error].MaybeIssued. Its rules, and why:
//
//   - A call is retried, at most twice, only if Cable cannot have processed it, because no byte of it was sent, or if
//     Cable responded 429 with a Retry-After that fits the budget. Cable has no idempotency key and cannot revoke, so
//     any other retry could leave a second token that was not delivered. Only a 4xx other than 408 shows that no token
//     was issued.
//   - A call is sent only if [TokenRequest].Allow still permits it when the connection is there.
//   - After a 429 no call is made until the time that Cable named, but for five minutes at most; see [Pause].
//   - A response is used only after it was read whole, within a bound, and decoded by the documented types. Redirects
//     are not followed, so the refresh key is sent to one host. Proxies come from the environment.
//   - No error, no formatted value and no JSON of a type of this package contains the refresh key or an access token;
//     see [Secret] and [Error].
//
// The caller compares the grant with the request.
//
// NOTE: net/http writes to Go's standard logger, and so to standard error, the bytes that follow a complete response (a
// second response, or the rest of a body whose Content-Length is too small), which may contain a token or an echo of
// the refresh key. A client that reuses connections cannot prevent that, so the program must discard the standard
// logger.
package cable
