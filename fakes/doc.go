// Package fakes holds in-memory stand-ins for what Holdfast talks to: a
// hypervisor with real disk bytes, copy-on-write snapshots and change tracking, a
// repository on a store that can lose what was not synced, a clock that a test
// moves by hand, and wrappers that number every call and make chosen ones fail.
//
// A [World] is the platform: VMs, guests, storage. It outlives every
// [Hypervisor] value, which is one connection to it, so a test can drop a
// process in mid-work and look at what the next one finds. The methods of World
// are the hands of the administrator and of the guests; the methods of
// Hypervisor are the contract.
package fakes
