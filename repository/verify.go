package repository

import "errors"

// Conditions that callers match with errors.Is.
var (
	ErrNotFound       = errors.New("not found in the repository")
	ErrDamaged        = errors.New("stored data is damaged")
	ErrLocked         = errors.New("locked by somebody else")
	ErrFenced         = errors.New("lease was lost to somebody else")
	ErrPassword       = errors.New("wrong repository password")
	ErrNotRepository  = errors.New("not a repository")
	ErrExists         = errors.New("already exists in the repository")
	ErrNoSpace        = errors.New("repository is out of space")
	ErrReadOnly       = errors.New("repository cannot be written")
	ErrOutcomeUnknown = errors.New("outcome of the commit is unknown")
	ErrStale          = errors.New("run stood still for too long") // nothing was committed
)

// VerifyLevel says how deep Verify looks.
type VerifyLevel int

// Levels. Each includes the ones above it.
const (
	VerifyRecords VerifyLevel = iota // records, chains, inventory of stored objects by presence and size
	VerifyBlobs                      // and the digest of every stored object, without opening the engine
	VerifyData                       // and every block of every disk against its leaves and root
)

// VerifyOptions narrow a check. The zero value checks records and inventory of
// everything.
type VerifyOptions struct {
	Points   []PointID // none: all
	Level    VerifyLevel
	Progress func(done, total int64) // bytes; may be nil, may be called concurrently
}

// VerifyReport is the result of a check.
type VerifyReport struct {
	Points  []PointID // that were checked
	Blobs   int64     // stored objects seen
	Bytes   int64     // bytes read
	Damages []Damage
}

// OK reports whether no damage was found.
func (r *VerifyReport) OK() bool { return len(r.Damages) == 0 }

// Damaged returns the points that cannot be restored in full, without repeats, in
// the order found.
func (r *VerifyReport) Damaged() []PointID {
	var out []PointID
	seen := map[PointID]bool{}
	for _, d := range r.Damages {
		for _, p := range d.Points {
			if !seen[p] {
				seen[p] = true
				out = append(out, p)
			}
		}
	}
	return out
}

// Damage is one finding.
type Damage struct {
	Object     string    // stored object, disk range or record
	Problem    string    // "missing", "truncated", "digest", "size", ...
	Detail     string    // for a person
	Points     []PointID // that are affected; none: only redundancy was lost
	Repairable bool      // a copy exists that repair can use
}

// MaintainOptions steer maintenance. The zero value does what is due.
type MaintainOptions struct {
	Full bool // a full cycle even if it is not due; safety times stay in force
}

// MaintainReport tells what maintenance did.
type MaintainReport struct {
	Ran         bool // false: nothing was due
	BlobsBefore int64
	BlobsAfter  int64
	BytesBefore int64
	BytesAfter  int64
	Notes       []string
}
