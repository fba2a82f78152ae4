// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package cable is a client of Cable's token API, POST /v2/auth/token, which issues short-lived access tokens to the
// holder of a long-lived refresh key. It speaks HTTP and JSON and knows nothing of Vault.
//
// Its rules, and why:
//
//   - A call is retried only if it cannot have issued a token: the connection
//     could not be made, or Cable responded 429 with a Retry-After that fits the
//     budget. Cable has no idempotency key and cannot revoke, so any other retry
//     could leave a second token that nobody receives.
//   - If a call may have issued a token that was not delivered, the error says
//     so: see [Error].MaybeIssued. Only a 4xx other than 408 says that no token
//     was issued.
//   - After a 429 no call is made until the time that Cable named; see [Pause].
//   - A response is used only after it was read whole, within a bound, and
//     decoded by the documented types. Redirects are not followed: the refresh
//     key is sent to one host.
//   - No error, no formatted value and no JSON of a type of this package contains
//     the refresh key or an access token; see [Secret] and [Error].
//
// The caller compares what was granted with what was requested.
//
// NOTE: net/http writes to Go's standard logger, and so to standard error: on HTTP/1.1 the bytes that follow a complete
// response (a second response, or the rest of a body whose Content-Length is too small), which may contain a token or
// an echo of the refresh key; on HTTP/2 every header, if the environment has GODEBUG=http2debug=1. A client that reuses
// connections cannot prevent that: the program must discard the standard logger.
package cable
