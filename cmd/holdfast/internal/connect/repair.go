package connect

import (
	"context"

	"github.com/holdfast-backup/holdfast/repository/kopiarepo"
)

// RepairReport tells what a repair did.
type RepairReport = kopiarepo.RepairReport

// Repair brings what can be brought back of the repository at cfg.Location into a
// new one at to, whose directory is missing or empty. The old one is only read.
func Repair(ctx context.Context, cfg RepositoryConfig, to string) (*RepairReport, error) {
	dir, err := Location(cfg.Location)
	if err != nil {
		return nil, err
	}
	dest, err := Location(to)
	if err != nil {
		return nil, err
	}
	return kopiarepo.Repair(ctx, engine(dir, cfg), dest)
}
