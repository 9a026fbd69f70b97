// Package hypervisortest is the conformance suite of the hypervisor contract.
// A driver that passes it can be used by every pipeline:
//
//	func TestConformance(t *testing.T) {
//		hypervisortest.Run(t, func(t hypervisortest.T) *hypervisortest.Harness { ... })
//	}
//
// The suite needs a VM with two tracked disks and a way to write to them from
// the guest's side. Everything else in [Harness] is optional; checks that need
// what is not there are skipped, and say so. Capabilities are checked both ways:
// what is declared must work, and what is not must answer
// [errors.ErrUnsupported].
//
// The property that all else serves: the content at a baseline, overlaid with
// the extents that changed since then, is the new content. It is tried over
// random writes; the seed is logged, and taken from HOLDFAST_SEED when that is
// set.
package hypervisortest
