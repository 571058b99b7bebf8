package main

import "time"

// What was measured, on two cores (README, "Figures"), and what Gatehouse's own
// bounds are (docs/operations.md).
const (
	tenantKB = 49 // of memory, an idle tenant with a bundle of its own, of 10,000

	// loadRate is how many loads of a small bundle two cores finish in a second:
	// 10,000 in 22 s.
	loadRate = 10_000.0 / 22

	loadsAtOnce  = 16   // of a replica
	loadsWaiting = 4096 // of a replica; a check that finds no place is answered with 503
	pollsAtOnce  = 16   // of a replica, to one service
	parked       = 1000 // tenants that were pushed out and may come back without a load

	// deadline is how long a check waits for a load where Envoy waits 500 ms: a
	// third is kept for the way, at most 100 ms.
	deadline = 400 * time.Millisecond

	pollDelay = 90.0 // seconds, the mean of OPA's 60 to 120
)
