package kopiarepo

import (
	"context"
	"errors"

	"github.com/holdfast-backup/holdfast/repository"
)

// Maintain is not there yet.
func (r *Repository) Maintain(context.Context, repository.Lock, *repository.MaintainOptions) (*repository.MaintainReport, error) {
	return nil, errors.ErrUnsupported
}

// Verify is not there yet.
func (r *Repository) Verify(context.Context, *repository.VerifyOptions) (*repository.VerifyReport, error) {
	return nil, errors.ErrUnsupported
}
