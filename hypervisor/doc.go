// Package hypervisor is the contract between Holdfast's pipelines and the
// platforms they protect. It imports the standard library alone, so naming an
// interface never costs an SDK.
//
// # Vocabulary
//
// A [VM] is data: what was true when it was asked for. A [Snapshot] is a frozen
// instant of a VM on the hypervisor; it costs space there and must be released.
// A [Baseline] is what a platform keeps (or a string that it will recognise) so
// that the next snapshot can say what changed since; it belongs to one disk. An
// [Extent] is a byte range of a disk. A disk's ID names its slot and is stable;
// its Content names what is plugged into the slot, and may change.
//
// # Lifecycle of a backup
//
//	snap := CreateSnapshot(Since: old baselines)   // one instant for all disks
//	journal snap.Ref() before anything else
//	for each disk: Extents(disk, old) -> OpenDisk -> ReadAt
//	commit the restore point, with the new baselines in it
//	snap.Release(keep: disks whose new baseline stays)
//	ForgetBaseline(old)
//
// On failure Release(nil) is called instead and the old baselines stay, so the
// chain is never shorter than the newest committed restore point.
//
// # Rules for implementers
//
// Every method may be called concurrently unless it says otherwise. Every
// returned error is an [*Error], or wraps the error of the context that ended
// it. A method that cannot do what it is asked returns an error that wraps
// [errors.ErrUnsupported], and [Info].Capabilities says so beforehand; the
// conformance suite hypervisortest checks that the two agree. Nothing is left
// behind by a call that fails, unless the error says so (see [ErrThawPending]).
package hypervisor
