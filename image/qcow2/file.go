package qcow2

import (
	"errors"

	"github.com/holdfast-backup/holdfast/image/internal/partial"
)

// PartialSuffix is what the name of a file ends in until it is committed.
const PartialSuffix = partial.Suffix

// Create returns a Writer for a new image file at path, for a disk of size bytes (see
// [NewWriter]). Until Commit the file is called path+[PartialSuffix]; Close without Commit removes
// it. Neither name may exist, else the error is an [fs.ErrExist].
func Create(path string, size int64) (*Writer, error) {
	p, err := partial.Create(path)
	if err != nil {
		return nil, &Error{Op: "create", Err: err}
	}
	w, err := NewWriter(p, size)
	if err != nil {
		return nil, errors.Join(err, p.End(false))
	}
	w.end = p.End
	return w, nil
}
