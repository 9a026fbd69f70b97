// Package campaign lets everything that can fail do so: each call to the hypervisor
// and each operation of repository and journal, in each story, in each way, one at a
// time; and after each it asks whether the promise was kept. It also opens whatever a
// crash at any moment would leave, and simulates several hosts at once. It consists
// of tests.
//
// HOLDFAST_FAULTS chooses how much: empty is a sample for go test, ci fails every
// call in some of the ways, all in all of them, divided by HOLDFAST_SHARD=i/n; errors
// is enough to see whether errors are heard.
// HOLDFAST_FAULT replays one failure, as it was printed.
package campaign
