package backup

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/stretchr/testify/require"
)

// brokenReader fails as its fields say.
type brokenReader struct {
	n   int
	err error
}

func (brokenReader) Size() int64                             { return 1 << 20 }
func (r brokenReader) ReadAt(_ []byte, _ int64) (int, error) { return r.n, r.err }
func (brokenReader) Close() error                            { return nil }

// TestReadBlockKeepsTheCause: only a bare io.EOF is the end of a disk. What wraps
// one, such as the loss of a connection, is reported with its cause.
func TestReadBlockKeepsTheCause(t *testing.T) {
	lost := errors.New("the job was given up")
	for _, c := range []struct {
		r    brokenReader
		want error
	}{
		{brokenReader{4096, nil}, nil},
		{brokenReader{4096, io.EOF}, nil},
		{brokenReader{4096, fmt.Errorf("%w: %w", lost, io.EOF)}, lost},
		{brokenReader{0, fmt.Errorf("%w: %w", lost, io.EOF)}, lost},
		{brokenReader{512, io.EOF}, io.ErrUnexpectedEOF},
		{brokenReader{512, nil}, io.ErrUnexpectedEOF},
	} {
		_, err := readBlock(c.r, make([]byte, 4096), 0)
		require.ErrorIs(t, err, c.want, "%v", c.r)
	}
}
