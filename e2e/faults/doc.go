// Package faults makes ill what gatehouse depends on and whom it serves, one
// fault after the other, while others go on asking it. Each test is a fault and
// logs what came of it, with figures.
//
// Whatever the fault, an answer is either what "opa eval" says of the revision
// that the answer names, or a denial. One wrong allow fails a test; how many
// denials there may be is the test's own affair.
//
// The tests need Linux, and the tools that fetch-envoy and fetch-tools leave in
// .cache. With GATEHOUSE_FAULTS_SOAK, a duration such as 8h, faults come at
// random for that long in TestSoak, which is left out otherwise; give go test a
// -timeout that is longer.
package faults
