package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
	"github.com/holdfast-backup/holdfast/internal/journal"
)

func newReader(b []byte) io.Reader { return bytes.NewReader(b) }

// cleanup returns a context that outlives the run's, with a deadline of its own.
func (r *run) cleanup(ctx context.Context) (context.Context, context.CancelFunc) {
	return clock.WithTimeout(context.WithoutCancel(ctx), r.o.Clock, r.o.CleanupTimeout)
}

// release gives back the snapshot after a commit: it keeps the new baselines and
// drops the old ones. What fails leaves its obligation open.
func (r *run) release(ctx context.Context) error {
	ctx, cancel := r.cleanup(ctx)
	defer cancel()
	if err := r.giveBack(ctx, true); err != nil {
		r.res.degrade("cleanup on the hypervisor is not finished, run holdfast recover: " + err.Error())
	}
	return nil
}

// giveBack releases the snapshot, keeping its baselines or not, and discharges
// what that closes.
func (r *run) giveBack(ctx context.Context, keep bool) error {
	if !r.book.isOpen(journal.Snapshot) {
		return nil
	}
	if r.snap != nil {
		var disks []hypervisor.DiskID
		if keep {
			disks = slices.Sorted(maps.Keys(r.baselines))
		}
		if err := r.snap.Release(ctx, disks); err != nil {
			return err
		}
	} else if err := releaseNamed(ctx, r.hv, r.vm.ID, r.name, keep); err != nil {
		// CreateSnapshot failed, and may have done its work all the same.
		return err
	}
	if err := r.book.discharge(journal.Snapshot); err != nil {
		return err
	}
	if r.unknown {
		return nil // Recover decides about the baselines, when it knows of the point
	}
	var err error
	if r.committed {
		err = forgetOthers(ctx, r.hv, r.vm.ID, r.lease.Check, r.repo.Info().Repo8(), r.baselines)
	} else {
		err = forgetBaselines(ctx, r.hv, r.vm.ID, unfenced, func(b hypervisor.Baseline) bool { return b.Name == r.name })
	}
	if err != nil {
		return err
	}
	return r.book.discharge(journal.Baseline)
}

// unwind undoes what the stages left, whatever ended them. Only a run without a
// commit can fail here; one with a commit is degraded.
func (r *run) unwind(ctx context.Context, cause error) error {
	ctx, cancel := r.cleanup(ctx)
	defer cancel()
	var errs []error
	try := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("cleanup: %s: %w", what, err))
		}
	}
	if r.book.isOpen(journal.Thaw) {
		// The obligation stays open unless the guest is seen thawed.
		if err := hypervisor.Thaw(ctx, r.hv, r.vm.ID); err == nil {
			try("journal", r.book.discharge(journal.Thaw))
			r.o.Events.notice(r.vm.Name, "the guest was thawed")
		} else if !errors.Is(err, errors.ErrUnsupported) {
			r.o.Events.notice(r.vm.Name, "the guest may still be frozen, holdfast recover thaws it: "+err.Error())
		}
	}
	if r.writer != nil && !r.committed && !r.unknown {
		try("abort the point", r.writer.Abort(ctx))
	}
	if r.parent != nil {
		try("close the base", r.parent.Close())
	}
	if !r.committed {
		try("snapshot", r.giveBack(ctx, r.unknown))
	}
	try("journal", r.book.close(ctx))
	if r.lease != nil {
		try("lease", r.lease.Release(ctx))
	}
	if r.committed && cause == nil {
		for _, err := range errs {
			r.res.degrade(err.Error())
		}
		return nil
	}
	return errors.Join(errs...)
}
