// Package repository is the contract of the store that restore points live in.
// It imports the standard library alone and knows nothing of VMs: it stores
// disks as blocks, small files, and an opaque document per point.
//
// # Vocabulary
//
// A [Point] is a restore point: complete or absent. A chain is the series of
// points of one VM, in the order of their sequence numbers; nothing is physically
// chained, every point is a complete logical map, and deleting one touches no
// other. A [Block] is the unit of storage: fixed size per disk, aligned, the
// last one short. A leaf is the unit of proof: [LeafSize] bytes of plaintext
// have one keyed [Digest], computed where the bytes left the hypervisor, and
// stored beside the block. A segment is [Info].SegmentBytes of blocks whose map is
// loaded and shared as one.
//
// # Lifecycle
//
//	lock := repo.Lock(ctx, "vm-...", ...)
//	w := repo.Begin(ctx, &PointSpec{Chain, Parent, Run, Lock})
//	d := w.Disk(ctx, DiskSpec{..., Inherit: true})
//	d.WriteBlock(...) from many goroutines; d.Advance(n) now and then; d.Close(ctx)
//	w.File(ctx, "config", r)
//	proof := w.Commit(ctx, &CommitInfo{...})       // one atomic put makes it visible
//
// Anything before Commit returns is invisible to every reader, and is collected
// by maintenance.
package repository
