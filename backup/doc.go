// Package backup makes restore points of virtual machines: it plans, snapshots,
// reads what changed, stores it, commits, and gives back what it used on the
// hypervisor. It knows hypervisors and repositories by their contracts alone.
//
// A run is a state machine. Each stage writes what it is about to do into a
// journal before it does it, so that a run that was killed at any moment can be
// finished or undone by [Recover] or by the next run. A [Result] says success
// only when the repository proved the commit, and says what was not protected.
package backup
