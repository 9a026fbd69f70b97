package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/internal/manifest"
	"github.com/holdfast-backup/holdfast/repository"
)

// AuditResult tells what the audit of one disk's change tracking found.
type AuditResult struct {
	Leaves int64 // leaves called unchanged that were compared with the parent's
	Wrong  int64 // of Leaves: differ
	// Offsets are where the first wrong leaves begin, in bytes, ascending, at
	// most MaxAuditOffsets.
	Offsets []int64
	// Suspects are earlier points that were made by the same change tracking and
	// may hold wrong bytes of this disk, newest first.
	Suspects []repository.PointID
	// Err is why the audit is not complete; nil if it is. It fails nothing but
	// makes the run degraded.
	Err error
}

// MaxAuditOffsets is how many wrong leaves an AuditResult names.
const MaxAuditOffsets = 8

// Lied reports whether the change tracking was caught.
func (a *AuditResult) Lied() bool { return a.Wrong > 0 }

// audited is the audit of a disk as its point tells of it; nil if there was none.
func (d *DiskResult) audited(seed uint64) *manifest.Audit {
	a := &d.Audit
	if a.Leaves == 0 && a.Err == nil {
		return nil
	}
	out := &manifest.Audit{
		Bytes: d.AuditedBytes, Seed: seed, Leaves: a.Leaves, Wrong: a.Wrong, Offsets: a.Offsets, Suspects: a.Suspects,
	}
	if a.Err != nil {
		out.Error = a.Err.Error()
	}
	return out
}

// enoughLeaves is after how many leaves an audit ends that has found a wrong one.
const enoughLeaves = defaultAuditBytes / repository.LeafSize

// auditor draws and compares leaves. It is shared by the disks of a run.
type auditor struct {
	rate AuditRate
	seed uint64
	// lied makes durable what was found before the disk is read in full.
	lied func(ctx context.Context, disk hypervisor.DiskID, a *AuditResult)
}

// errSource marks what went wrong with reading from the hypervisor.
type errSource struct{ err error }

func (e *errSource) Error() string { return e.err.Error() }
func (e *errSource) Unwrap() error { return e.err }

// errUnstable says that two readings of a snapshot are not the same.
type errUnstable struct{ off, length int64 }

func (e *errUnstable) Error() string {
	return fmt.Sprintf("the %d bytes at %d of the snapshot are not the same when they are read twice", e.length, e.off)
}

// audit reads a sample of the leaves that an incremental would inherit, and
// compares them with the parent's digests. It comes before the disk is begun in
// the repository: a wrong leaf, or a parent that cannot be compared with, turns
// plan into a full, and then it returns false.
func (m *mover) audit(ctx context.Context, r hypervisor.DiskReader, set *blockSet, plan *DiskPlan, res *DiskResult) (bool, error) {
	k := m.auditor.rate.leaves(plan.Size)
	if k = min(k, set.inheritedLeaves()); k == 0 || m.parent == nil {
		return true, nil
	}
	a := &leafAudit{m: m, r: r, plan: plan, hash: digest.New(m.parent.DigestKey())}
	err := a.run(ctx, set, k)
	res.AuditedBytes = a.bytes
	slices.Sort(a.offsets)
	res.Audit = AuditResult{Leaves: a.leaves, Wrong: int64(len(a.offsets)), Offsets: slices.Clip(a.offsets[:min(len(a.offsets), MaxAuditOffsets)])}
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	var source *errSource
	var unstable *errUnstable
	switch {
	case errors.As(err, &unstable):
		return false, &hypervisor.Error{
			Op: "audit", VM: m.snap.VM().ID, Disk: plan.ID, Err: unstable,
			Hint: "memory, a cable or a storage device between the snapshot and this program is failing",
		}
	case res.Audit.Lied():
		plan.Mode, plan.Reason, plan.since = Full, ReasonAuditMismatch, nil
		plan.Detail = res.Audit.describe() + " from point " + string(m.parent.Point().ID)
		m.auditor.lied(ctx, plan.ID, &res.Audit)
	case errors.As(err, &source):
		res.Audit.Err = &hypervisor.Error{Op: "audit", VM: m.snap.VM().ID, Disk: plan.ID, Err: source.err}
	case errors.Is(err, repository.ErrDamaged), errors.Is(err, repository.ErrNotFound):
		plan.Mode, plan.Reason, plan.Detail, plan.since = Full, hypervisor.ReasonChainUnhealthy, err.Error(), nil
	case err != nil:
		return false, fmt.Errorf("audit of disk %s: %w", plan.ID, err)
	}
	m.events.audit(AuditEvent{VM: m.vm, Disk: plan.ID, Leaves: res.Audit.Leaves, Bytes: res.AuditedBytes, Wrong: res.Audit.Wrong})
	return plan.Mode == Incremental, nil
}

// describe says what was found, for a person.
func (a *AuditResult) describe() string {
	return fmt.Sprintf("%d of %d sampled leaves of %d KiB that the hypervisor called unchanged differ, the first at byte %d,",
		a.Wrong, a.Leaves, repository.LeafSize>>10, a.Offsets[0])
}

// leafAudit is the audit of one disk going on.
type leafAudit struct {
	m    *mover
	r    hypervisor.DiskReader
	plan *DiskPlan
	hash *digest.Hasher
	base repository.DiskReader

	mu            sync.Mutex
	leaves, bytes int64
	offsets       []int64 // of wrong leaves
}

// run compares k leaves, as many at a time as there are blocks in flight.
func (a *leafAudit) run(ctx context.Context, set *blockSet, k int64) (err error) {
	if a.base, err = a.m.parent.Disk(ctx, string(a.plan.ID)); err != nil {
		return err
	}
	defer a.base.Close() //nolint:errcheck // a reader has nothing to lose
	if a.base.Size() != a.plan.Size || a.base.BlockSize() != a.plan.blockSize {
		return fmt.Errorf("it has %d bytes in blocks of %d, the parent's %d in blocks of %d: %w",
			a.plan.Size, a.plan.blockSize, a.base.Size(), a.base.BlockSize(), repository.ErrDamaged)
	}
	g, gctx := errgroup.WithContext(ctx)
	err = a.produce(gctx, g, set, k)
	if werr := g.Wait(); werr != nil {
		err = werr // the worker's error is the cause of the producer's
	}
	return err
}

// produce starts a worker for each run of drawn leaves within a block.
func (a *leafAudit) produce(ctx context.Context, g *errgroup.Group, set *blockSet, k int64) error {
	per := set.leavesPerBlock()
	first, count := int64(0), int64(0)
	flush := func() error {
		if count == 0 {
			return nil
		}
		leaf, off := first, first*repository.LeafSize
		n := min(count*repository.LeafSize, a.plan.Size-off)
		count = 0
		buf, err := a.m.buffer(ctx, int(n))
		if err != nil {
			return err
		}
		g.Go(func() error {
			defer a.m.free(buf)
			return a.compare(ctx, buf, leaf/per, int(leaf%per), off)
		})
		return nil
	}
	for leaf := range set.sample(k, auditRandom(a.m.auditor.seed, a.plan.ID)) {
		if count > 0 && leaf == first+count && leaf/per == first/per {
			count++
			continue
		}
		if err := flush(); err != nil {
			return err
		}
		if a.enough() {
			return nil
		}
		first, count = leaf, 1
	}
	return flush()
}

// enough tells whether more leaves would change nothing: the tracker was caught,
// and how badly it lies is known.
func (a *leafAudit) enough() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.offsets) > 0 && a.leaves >= enoughLeaves
}

// compare reads the leaves from off, which are those of block from number first
// on, as many as p holds.
func (a *leafAudit) compare(ctx context.Context, p []byte, block int64, first int, off int64) error {
	stored, err := a.base.Leaves(ctx, block)
	if err != nil {
		return err
	}
	hole, err := readBlock(a.r, p, off)
	if err != nil {
		return &errSource{err}
	}
	var few [repository.MaxBlockSize / repository.LeafSize]repository.Digest
	got := few[:(len(p)+repository.LeafSize-1)/repository.LeafSize]
	if !hole {
		got = a.hash.Leaves(few[:0], p)
	}
	if len(stored) < first+len(got) {
		return fmt.Errorf("block %d has %d digests: %w", block, len(stored), repository.ErrDamaged)
	}
	var wrong []int64
	again := false
	for i := range got {
		if got[i] == stored[first+i] {
			continue
		}
		if !again {
			if err := a.again(p, off, hole); err != nil {
				return err
			}
			again = true
		}
		wrong = append(wrong, off+int64(i)*repository.LeafSize)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.leaves += int64(len(got))
	a.bytes += int64(len(p))
	a.offsets = append(a.offsets, wrong...)
	return nil
}

// again reads p, which was read from off and accuses the tracker, a second time.
// A source that answers differently proves nothing about the tracker, and nothing
// that was read from it can be believed.
func (a *leafAudit) again(p []byte, off int64, hole bool) error {
	q := make([]byte, len(p))
	zero, err := readBlock(a.r, q, off)
	if err != nil {
		return &errSource{err}
	}
	if hole {
		clear(p)
	}
	if zero {
		clear(q)
	}
	if !bytes.Equal(p, q) {
		return &errUnstable{off: off, length: int64(len(p))}
	}
	return nil
}
