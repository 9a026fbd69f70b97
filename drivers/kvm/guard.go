package kvm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// jobCheck is the pause between looks at whether the job still runs.
const jobCheck = time.Second

// watch guards the job until Release or Close: before scratch space runs out it
// aborts the job, for else the guest's writes would fail.
func (s *snapshot) watch() {
	if s.usable() != nil {
		return
	}
	s.d.background(func(life context.Context) {
		ctx, cancel := context.WithCancel(life)
		defer cancel()
		s.mu.Lock()
		if s.released || s.cause != nil {
			s.mu.Unlock()
			return
		}
		s.stop = cancel
		s.mu.Unlock()
		s.guard(ctx)
	})
}

func (s *snapshot) guard(ctx context.Context) {
	d := s.d
	checked := d.cfg.Clock()
	for {
		free, total, err := d.files.space(d.cfg.ScratchDir)
		if err != nil {
			s.giveUp(ctx, fmt.Errorf("scratch space cannot be watched: %w", err))
			return
		}
		reserve := d.reserve(total)
		if free < reserve {
			s.giveUp(ctx, fmt.Errorf("scratch directory %s has %d bytes free, less than the reserve of %d: the backup was given up so that no write of the guest fails: %w",
				d.cfg.ScratchDir, free, reserve, hypervisor.ErrNoSpace))
			return
		}
		if now := d.cfg.Clock(); now.Sub(checked) >= jobCheck {
			checked = now
			if s.lost(ctx) {
				return
			}
		}
		if d.cfg.Sleep(ctx, guardPause(free-reserve)) != nil {
			return
		}
	}
}

// lost notices the end of the job by other hands: the guest stopped, somebody
// aborted it. A daemon that does not answer is no proof: QEMU goes on without it.
func (s *snapshot) lost(ctx context.Context) bool {
	j, err := s.d.job(ctx, s.uuid)
	switch {
	case ctx.Err() != nil:
		return true
	case errors.Is(err, hypervisor.ErrNotFound):
		s.setCause(fmt.Errorf("the domain is gone: %w", hypervisor.ErrUnavailable))
		return true
	case err != nil:
		return false
	case j == nil || j.owner(s.uuid) != s.name:
		s.setCause(fmt.Errorf("the backup job ended before it was released, because the VM stopped or somebody aborted it: %w", hypervisor.ErrUnavailable))
		return true
	}
	return false
}

func (s *snapshot) setCause(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause == nil {
		s.cause = err
	}
}

// giveUp ends the job. The cause is set first, so that readers that fail by it
// tell it.
func (s *snapshot) giveUp(ctx context.Context, cause error) {
	s.setCause(cause)
	s.d.cfg.Logger.ErrorContext(ctx, "backup job given up", "vm", s.vm.Name, "cause", cause)
	actx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	if err := s.d.conn.abortJob(actx, s.uuid); err != nil && virCode(err) != virOperationInvalid {
		s.d.cfg.Logger.ErrorContext(ctx, "backup job could not be aborted", "vm", s.vm.Name, "error", err)
	}
}
