// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package cable is a client of Cable's token API: POST /v2/auth/token, which
// exchanges a long-lived refresh key for a short-lived access token. It knows
// HTTP and JSON, and nothing of Vault.
//
// The rules it keeps, and why:
//
//   - A request is repeated only where nothing can have been minted: the
//     connection could not be made, or Cable answered 429 or 503 with a
//     Retry-After that fits the budget. Cable has no idempotency key and cannot
//     revoke, so any other repeat could leave a live token that nobody holds.
//   - After a 429 nobody is called until the time that Cable named; see [Pause].
//   - Nothing is believed before it was read whole, within a bound, and decoded
//     by the documented types. Redirects are not followed: the refresh key goes to one host.
//   - No error, no formatted value and no JSON of a type of this package holds
//     the refresh key or an access token; see [Secret] and [Error].
//
// Comparing what was granted with what was asked is the caller's part.
package cable
