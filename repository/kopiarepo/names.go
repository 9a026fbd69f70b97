package kopiarepo

import (
	"errors"
	"io/fs"
	"regexp"

	"github.com/holdfast-backup/holdfast/repository"
)

var (
	chainPattern = regexp.MustCompile(`^[a-z0-9._-]{1,128}$`)
	runPattern   = regexp.MustCompile(`^[a-z0-9]{1,32}$`)
	partPattern  = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)
	pointPattern = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)
	notePattern  = regexp.MustCompile(`^[a-z0-9./-]{1,128}$`)
)

// validChain reports whether name names a chain. "." and ".." would be
// directories.
func validChain(name string) bool {
	return chainPattern.MatchString(name) && name != "." && name != ".."
}

func validPoint(id repository.PointID) bool { return pointPattern.MatchString(string(id)) }

// isTaken reports that a number of a log was taken by somebody else.
func isTaken(err error) bool {
	return errors.Is(err, fs.ErrExist) && !errors.Is(err, repository.ErrOutcomeUnknown)
}
