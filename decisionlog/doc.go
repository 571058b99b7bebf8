// Package decisionlog remembers: it keeps a record of each decision and delivers
// it, as OPA's decision log event on OPA's wire, to the sinks of the tenant.
//
// In the common case Record puts the event into the tenant's buffer, and nothing
// more. Soon after, a worker that all tenants share takes what has gathered: it
// asks the drop and mask rules of the policy that decided, hides secrets, writes
// the JSON once and adds it to the open chunk of each sink. A chunk that is full,
// or due, is compressed and waits in order until the schedule delivers it. A Log
// owns no goroutine; one with nothing to deliver is a few hundred bytes.
//
// What others lean on:
//
// The books balance. At any instant, and in every scrape, the events recorded are
// those delivered, those dropped, each for one reason, and those buffered. An
// event that has several sinks is delivered when all have it, and dropped once
// none holds it any more and one of them never got it.
//
// Memory is bounded, per tenant and in all: events as they were recorded, their
// JSON in open chunks and compressed chunks count, by estimate, until they are
// delivered or dropped. A tenant may fill what is free of the memory of all,
// within its own bound, so one whose sink is dead leaves room to the others. What
// happens at the bound is the tenant's choice, and is done to its own events.
//
// Delivery is at least once and in order for each sink: only an event whose
// delivery was not confirmed is delivered again. Nothing a sink or a policy does
// delays Record, but for a tenant that chose to wait.
package decisionlog
