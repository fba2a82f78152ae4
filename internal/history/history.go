// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package history checks what a mount did, while many clients used it at once, against a model of its promises.
//
// A test records a [History] of changes, API calls and reads, and [History.Check] returns the promises that it breaks.
// They are promises of docs/design.md:
//
//   - Once a write that disables, deletes or narrows has returned, no API call is sent with the settings from before.
//     When a call passes its gate, the settings permit it ([sent]).
//   - No token is returned whose last check did not begin after such a write had returned. When a token is returned,
//     the settings permit it ([returned]).
//   - A token was minted with settings that were current at some time during its read, and a refusal had its reason at
//     some time during its read ([minted], [refused]).
//   - A reused token's call was sent at most reuse_for ago, at least half of its lifetime remains, and no change has
//     dropped it. A role has one shared call at a time, per settings.
//   - Of the tokens that Cable may have issued, each that no reader received is counted once, as undelivered.
//   - A write that has begun to store does not depend on its caller, and a failed trial stores nothing.
//
// The first three are checked for linearizability, with Porcupine: there is an order of the operations that agrees with
// their times, and in which each operation is right about the settings that the changes before it have left. A change
// lasts from its request to its response on the node that handled it, and to its invalidation, or the node's end, on
// another. A change that failed in storage lasts until it was committed, and is left out if it never was.
package history

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/hashicorp/vault/sdk/logical"
)

// Never is a time that does not come.
const Never = time.Duration(1<<63 - 1)

// History is a record of a mount. Times are since its beginning.
type History struct {
	Nodes   []*Node
	Changes []*Change
	Calls   []*Call
	Reads   []*Read

	// Begins has the settings before the first change.
	Begins Settings

	// IsExact says that the times of calls and responses are those of their checks, as with a virtual clock. Otherwise
	// they are known only to lie within their reads.
	IsExact bool
}

// Node is a mount on one node, from its set-up to its end.
type Node struct {
	Name           string
	SetUp, Cleaned time.Duration
	Undelivered    int // as it was counted
}

// Change is a write, a patch or a deletion of an entry, a tuning of the mount, or an invalidation without a change.
type Change struct {
	Node       *Node
	Path       string // "config", "roles/NAME", or "sys/mounts/tune"
	Op         logical.Operation
	Data       map[string]any
	Start, End time.Duration
	Err        string
	Status     int

	IsSpurious  bool                    // an invalidation without a change
	Began       bool                    // to store
	StorageTook time.Duration           // until storage responded
	StorageErr  string                  // of that response
	Committed   time.Duration           // Never if it was not
	Seen        map[*Node]time.Duration // when another node was told
}

// Call is an API call that a node made or tried to make.
type Call struct {
	Node  *Node
	Role  string
	Read  *Read   // nil for a shared call and a trial
	Tries *Change // of verify_role

	Organization, Scopes, Key, URL string
	Lifetime                       int // seconds

	Started, Gate, Ended time.Duration // Gate is Never if it was not passed
	MayBeIssued          bool
	Err                  string // "" if a token was delivered to the engine
	Granted              int    // seconds
	Token                string
}

// Read is a token request.
type Read struct {
	Node         *Node
	Role         string
	TTL          int // of the parameters, or 0
	Scopes       string
	Organization string
	NoLease      bool // of the response
	Start, End   time.Duration
	Status       int
	Err          string
	StorageErr   bool // storage failed during it
	Call         *Call
	Fallback     bool
}

// isShared reports whether the call was made for all readers of its role.
func (c *Call) isShared() bool { return c.Read == nil && c.Tries == nil }

// remaining is the part of the token's usable lifetime that is left at t.
func (c *Call) remaining(t time.Duration) time.Duration { return c.usable() - (t - c.Started) }

func (c *Call) usable() time.Duration {
	return time.Duration(min(c.Lifetime, c.Granted)) * time.Second
}

// isReused reports whether the token's call had ended when the read began.
func (r *Read) isReused() bool { return r.Call.isShared() && r.Call.Ended < r.Start }

// concerns reports whether the change is one of the role's settings.
func (c *Change) concerns(role string) bool {
	name, isRole := strings.CutPrefix(c.Path, "roles/")
	return !isRole || name == role
}

// seen returns when the change must be known to a node.
func (c *Change) seen(n *Node) time.Duration {
	switch told, ok := c.Seen[n]; {
	case n == c.Node || c.Node == nil:
		if c.Committed == Never {
			return c.End
		}
		return max(c.End, c.Committed)
	case n.SetUp > c.Committed:
		return c.Committed
	case ok:
		return told
	}
	return Never
}

// dropped returns when the change must have dropped the shared token on a node, Never if it does not.
func (c *Change) dropped(n *Node) time.Duration {
	switch {
	case c.Path == TunePath:
		return Never
	case n == c.Node && (c.Began || c.IsSpurious):
		return c.End
	case n == c.Node || c.Committed == Never:
		return Never
	}
	return c.seen(n)
}

// TunePath is the path of a change of max_lease_ttl.
const TunePath = "sys/mounts/tune"

// Check returns the promises that the history breaks, in words.
func (h *History) Check() (broken []string) {
	add := func(format string, args ...any) { broken = append(broken, fmt.Sprintf(format, args...)) }
	h.checkReuse(add)
	if h.IsExact { // otherwise the storage of the mount cannot be seen, and a counter ends with its node
		h.checkWrites(add)
		h.checkUndelivered(add)
	}
	roles := make(map[string]bool)
	for _, r := range h.Reads {
		roles[r.Role] = true
	}
	for _, n := range h.Nodes {
		for role := range roles {
			h.checkOrder(n, role, add)
		}
	}
	return broken
}

type report func(format string, args ...any)

// checkOrder looks for an order of the operations of one role on one node. If there is none for all of them, each is
// ordered among the changes on its own, because a change that has not returned may be seen by one request and not by
// the next.
func (h *History) checkOrder(n *Node, role string, add report) {
	var changes, others []porcupine.Operation
	operation := func(e event, start, end time.Duration) porcupine.Operation {
		return porcupine.Operation{Input: e, Call: int64(start), Return: int64(end)}
	}
	last := n.Cleaned // when the node can have seen a change; a read under way continues after the node's end
	for _, r := range h.Reads {
		if r.Node == n {
			last = max(last, r.End)
		}
	}
	for _, c := range h.Changes {
		if c.concerns(role) && c.Committed <= last && c.Committed != Never {
			changes = append(changes, operation(c, c.Start, c.seen(n)))
		}
	}
	for _, c := range h.Calls {
		if c.Node == n && c.Role == role && c.Gate != Never && h.IsExact {
			others = append(others, operation(sent{c}, c.Gate, c.Gate))
		}
	}
	for _, r := range h.Reads {
		if r.Node != n || r.Role != role {
			continue
		}
		if why := refusalIn(r.Err); why != "" {
			others = append(others, operation(refused{r, why}, r.Start, r.End))
		} else if r.Call != nil {
			others = append(others, operation(minted{r}, r.Start, r.End))
			if h.IsExact {
				others = append(others, operation(returned{r.Call}, r.End, r.End))
			}
		}
	}
	model := porcupine.Model{
		Init: func() any { return h.Begins },
		Step: func(state, input, _ any) (bool, any) {
			next, ok := input.(event).step(state.(Settings))
			return ok, next
		},
	}
	const patience = 10 * time.Second
	if porcupine.CheckOperationsTimeout(model, slices.Concat(changes, others), patience) == porcupine.Ok {
		return
	}
	for _, o := range others {
		all := slices.Concat(changes, []porcupine.Operation{o})
		if result := porcupine.CheckOperationsTimeout(model, all, patience); result != porcupine.Ok {
			add("no order of the changes explains that %s was %T (%s)", o.Input, o.Input, result)
		}
	}
	if porcupine.CheckOperationsTimeout(model, changes, patience) != porcupine.Ok {
		add("the changes of role %s have no order on node %s", role, n.Name)
	}
}

// checkWrites checks that a write which has begun to store fails only if storage does, that a write whose trial failed
// stores nothing, and that a read fails in storage only if storage failed, or a write of its entries.
func (h *History) checkWrites(add report) {
	for _, c := range h.Changes {
		const limit = 10 * time.Second // of a write
		isFine := c.Began && c.StorageErr == "" && c.StorageTook < limit && c.End < c.Node.Cleaned
		if isFine && c.Status >= 400 {
			add("%s failed although storage did not", c)
		}
		if c.Status < 400 && c.Committed == Never && c.Began {
			add("%s succeeded although it is not stored", c)
		}
	}
	for _, c := range h.Calls {
		if c.Tries != nil && c.Err != "" && c.Tries.Began {
			add("%s was stored although its trial failed", c.Tries)
		}
	}
	for _, r := range h.Reads {
		if r.Status != 500 || r.StorageErr {
			continue
		}
		isUncertain := slices.ContainsFunc(h.Changes, func(c *Change) bool {
			return c.Node == r.Node && c.concerns(r.Role) && c.Began && c.Status >= 500 && c.Start < r.End &&
				!slices.ContainsFunc(h.Changes, func(later *Change) bool { // settles it
					return later.Path == c.Path && later.Start > c.End && later.dropped(r.Node) < r.Start &&
						(later.Status < 400 || later.Node != r.Node)
				})
		})
		if !strings.Contains(r.Err, "write it again") || !isUncertain {
			add("%s failed, but neither storage nor a write did", r)
		}
	}
}

// checkReuse checks which tokens are returned to more than one reader, and when.
func (h *History) checkReuse(add report) {
	for _, r := range h.Reads {
		c := r.Call
		if c == nil {
			continue
		}
		if c.Tries != nil || c.Read != nil && c.Read != r || c.Node != r.Node {
			add("%s got the token of another request: %s", r, c)
		}
		if !r.isReused() {
			continue
		}
		left := c.remaining(r.Start)
		if r.Fallback {
			isDown := slices.ContainsFunc(h.Calls, func(later *Call) bool {
				return later.Node == c.Node && later.Role == c.Role && later.isShared() && later.Started > c.Started &&
					later.Started <= r.End && (later.Err != "" || later.Ended > r.Start)
			})
			if left < time.Minute || !isDown {
				add("%s got the previous token with %s left, Cable is down: %t", r, left, isDown)
			}
		} else if left < c.usable()/2 {
			add("%s got a token with %s left of %s", r, left, c.usable())
		}
		for _, change := range h.Changes {
			if change.concerns(r.Role) && c.Gate < change.Start && change.dropped(r.Node) < r.Start {
				add("%s got a token that %s had dropped: %s", r, change, c)
			}
		}
	}
	for _, first := range h.Calls {
		for _, second := range h.Calls {
			overlap := h.IsExact && first != second && first.isShared() && second.isShared() &&
				first.Node == second.Node && first.Role == second.Role &&
				first.Gate <= second.Gate && second.Gate < first.Ended
			if overlap && !h.changedBetween(first, second) {
				add("two shared calls with the same settings: %s and %s", first, second)
			}
		}
	}
}

// changedBetween reports whether the settings of two calls may differ. A failed write may be committed, and found, some
// time after it.
func (h *History) changedBetween(first, second *Call) bool {
	return slices.ContainsFunc(h.Changes, func(c *Change) bool {
		end := c.seen(first.Node)
		if c.Node == first.Node && c.Status >= 500 && c.Committed > c.Start && c.Committed != Never {
			end = max(end, c.Committed) + time.Minute
		}
		return c.concerns(first.Role) && c.Path != TunePath && c.Start <= second.Gate && end >= first.Gate
	})
}

// checkUndelivered compares the count of undelivered tokens on each node with the tokens that Cable may have issued and
// that no reader received. A shared token that no reader received, and that expires before it is dropped, may be
// counted or not.
func (h *History) checkUndelivered(add report) {
	received := make(map[*Call]bool)
	var end time.Duration
	for _, r := range h.Reads {
		received[r.Call], end = true, max(end, r.End)
	}
	for _, n := range h.Nodes {
		least, most := 0, 0
		for _, c := range h.Calls {
			if c.Node != n || !c.MayBeIssued || received[c] || c.Tries != nil {
				continue
			}
			if most++; !c.isShared() || c.Err != "" || c.remaining(min(end, n.Cleaned)) > 0 {
				least++
			}
		}
		if n.Undelivered < least || n.Undelivered > most {
			add("node %s counted %d undelivered tokens, and there are %d to %d", n.Name, n.Undelivered, least, most)
		}
	}
}

// String tells the history in the order of its beginnings.
func (h *History) String() string {
	type line struct {
		at   time.Duration
		text string
	}
	var lines []line
	for _, n := range h.Nodes {
		lines = append(lines, line{n.SetUp, fmt.Sprintf("%s is set up until %s", n.Name, at(n.Cleaned))})
	}
	for _, c := range h.Changes {
		lines = append(lines, line{c.Start, c.String()})
	}
	for _, c := range h.Calls {
		lines = append(lines, line{c.Started, c.String()})
	}
	for _, r := range h.Reads {
		lines = append(lines, line{r.Start, r.String()})
	}
	slices.SortStableFunc(lines, func(a, b line) int { return cmp.Compare(a.at, b.at) })
	var text strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&text, "  %s\n", l.text)
	}
	return text.String()
}

// at formats a time.
func at(t time.Duration) string {
	if t == Never {
		return "the end"
	}
	return fmt.Sprintf("%.6f", t.Seconds())
}

// span formats the time of an operation.
func span(n *Node, start, end time.Duration) string {
	name := "-"
	if n != nil {
		name = n.Name
	}
	return fmt.Sprintf("%12s %12s  %s ", at(start), at(end), name)
}

// String is the change in one line.
func (c *Change) String() string {
	text := span(c.Node, c.Start, c.End) + fmt.Sprintf("%s %s %v: %d %.90s", c.Op, c.Path, c.Data, c.Status, c.Err)
	if c.IsSpurious {
		text = span(c.Node, c.Start, c.End) + "invalidation of " + c.Path
	}
	if c.Committed != Never {
		text += ", committed at " + at(c.Committed)
	}
	for n, t := range c.Seen {
		text += fmt.Sprintf(", %s told at %s", n.Name, at(t))
	}
	return text
}

// String is the call in one line.
func (c *Call) String() string {
	kind := "shared call"
	if c.Tries != nil {
		kind = "trial"
	} else if c.Read != nil {
		kind = "call"
	}
	return span(c.Node, c.Started, c.Ended) + fmt.Sprintf("%s for %s, gate %s: %s %s %ds, %s at %s: %s (%ds) %s", kind,
		c.Role, at(c.Gate), c.Organization, c.Scopes, c.Lifetime, c.Key, c.URL, c.Token, c.Granted, c.Err)
}

// String is the read in one line.
func (r *Read) String() string {
	text := span(r.Node, r.Start, r.End) + "read " + r.Role
	if r.TTL > 0 || r.Scopes != "" {
		text += fmt.Sprintf(" ttl=%d scopes=%s", r.TTL, r.Scopes)
	}
	if r.Call == nil {
		return text + fmt.Sprintf(": %d %.110s", r.Status, r.Err)
	}
	return text + fmt.Sprintf(": %s, fallback %t", r.Call.Token, r.Fallback)
}
