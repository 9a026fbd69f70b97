package vmdk

import (
	"errors"
	"io"

	"github.com/holdfast-backup/holdfast/image/internal/partial"
)

// PartialSuffix is what the name of a file ends in until it is committed.
const PartialSuffix = partial.Suffix

// CreateStream returns a StreamWriter for a new file at path. Until Commit the file is called
// path+[PartialSuffix]; Close without Commit removes it. Neither name may exist, else the error is
// an [fs.ErrExist].
func CreateStream(path string, size int64, opts *StreamOptions) (*StreamWriter, error) {
	p, err := partial.Create(path)
	if err != nil {
		return nil, &Error{Op: "create", Err: err}
	}
	s, err := NewStreamWriter(&appender{f: p}, size, opts)
	if err != nil {
		return nil, errors.Join(err, p.End(false))
	}
	s.end, s.sync = p.End, p.Sync
	return s, nil
}

// appender writes a stream to the end of a file.
type appender struct {
	f   io.WriterAt
	off int64
}

func (a *appender) Write(p []byte) (int, error) {
	n, err := a.f.WriteAt(p, a.off)
	a.off += int64(n)
	return n, err
}
