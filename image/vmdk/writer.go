package vmdk

import (
	"bytes"
	"compress/zlib"
	"crypto/sha1"
	"encoding/binary"
	"hash"
	"io"
	"runtime"
	"strconv"
)

const (
	writeGrain    = 64 << 10
	writeGTEs     = 512
	writeOverhead = 128 * sector
	writeDesc     = 20 * sector
	maxWorkers    = 16

	// defaultLevel gives about the size that zlib's own default gives.
	defaultLevel = 6

	defaultCID = 0x686f6c64
	// emptyCID is the content ID of a disk that was never written to, NoParent the only one above.
	// VMware's tools keep away from both, because readers may take the disk for zeros.
	emptyCID = 0xfffffffe

	// maxStream is the largest file whose sectors a 32-bit entry can name, in bytes.
	maxStream = (1<<32 - 1) * sector
)

// StreamOptions tune a StreamWriter. The zero value is good.
type StreamOptions struct {
	Workers int    // compressions at a time; 0: one per processor, at most 16
	Level   int    // of [compress/zlib], 1 to 9; 0: a level that serves speed and size
	Name    string // file name in the descriptor; empty: "disk.vmdk"
	CID     uint32 // content ID, by which a delta knows its parent; 0: 0x686f6c64
	Adapter string // ddb.adapterType; empty: "lsilogic"
}

// StreamWriter writes a streamOptimized image to a stream, which it never seeks in. Writes come
// from one goroutine, ascending and without overlap; grains of 64 KiB that are skipped or zeros
// take no space. It holds about 1.5 MiB per worker, plus 128 KiB per TiB of disk.
//
// Only Commit writes the end of the stream, without which no image is complete. After an error of
// the stream the writer takes nothing more and Commit fails.
type StreamWriter struct {
	w    io.Writer
	end  func(commit bool) error // what CreateStream adds
	sync func() error            // likewise
	h    header
	pos  int64 // first byte of the disk that may still be written
	out  int64 // bytes written to w
	sum  hash.Hash

	buf   []byte // the grain being filled
	bufAt int64  // its index, -1 for none

	free  []*packer
	busy  []*packer // in the order of their grains
	gt    []byte
	gtAt  int64 // index of the grain table gt, -1 for none
	gd    []uint32
	zeros []byte // one grain and never changed

	err  error
	done bool
}

// NewStreamWriter returns a StreamWriter for a disk of size bytes, rounded up to a multiple of 512
// (Size says the result), and writes the header to w, which stays the caller's. opts may be nil.
func NewStreamWriter(w io.Writer, size int64, opts *StreamOptions) (*StreamWriter, error) {
	if size < 0 || size > MaxSize {
		return nil, &Error{Op: "create", Off: size, Err: ErrSize}
	}
	var o StreamOptions
	if opts != nil {
		o = *opts
	}
	if o.Workers <= 0 {
		o.Workers = min(runtime.GOMAXPROCS(0), maxWorkers)
	}
	if o.Level == 0 {
		o.Level = defaultLevel
	}
	if o.Level < zlib.BestSpeed || o.Level > zlib.BestCompression {
		return nil, &Error{Op: "create", Err: unsupported("compression level %d", o.Level)}
	}
	s := &StreamWriter{
		w: w, sum: sha1.New(), bufAt: -1, gtAt: -1,
		h: header{
			size: roundUp(size, sector), grain: writeGrain, gtes: writeGTEs, gd: -1,
			descOff: sector, descSize: writeDesc, overhead: writeOverhead,
		},
		gt:    make([]byte, writeGTEs*4),
		zeros: make([]byte, writeGrain),
	}
	s.gd = make([]uint32, s.h.gdEntries())
	for range min(o.Workers, maxWorkers) + 2 {
		p := &packer{in: make([]byte, writeGrain), ready: make(chan error, 1)}
		z, err := zlib.NewWriterLevel(&p.out, o.Level)
		if err != nil {
			return nil, &Error{Op: "create", Err: err}
		}
		p.z = z
		s.free = append(s.free, p)
	}
	s.buf = make([]byte, writeGrain)
	return s, s.begin(o)
}

func (s *StreamWriter) begin(o StreamOptions) error {
	if o.Name == "" {
		o.Name = "disk.vmdk"
	}
	if o.CID == 0 {
		o.CID = defaultCID
	}
	if o.CID >= emptyCID {
		return &Error{Op: "create", Err: unsupported("content ID %08x", o.CID)}
	}
	if o.Adapter == "" {
		o.Adapter = "lsilogic"
	}
	cylinders := min(max(1, s.h.size/sector/(255*63)), 1<<31-1)
	d := Descriptor{
		CID: o.CID, ParentCID: NoParent, CreateType: "streamOptimized",
		Extents: []ExtentLine{{Access: "RW", Size: s.h.size, Type: "SPARSE", Name: o.Name}},
		DDB: map[string]string{
			"ddb.adapterType": o.Adapter, "ddb.virtualHWVersion": "8",
			"ddb.geometry.cylinders": strconv.FormatInt(cylinders, 10), "ddb.geometry.heads": "255", "ddb.geometry.sectors": "63",
		},
	}
	text, err := d.Marshal()
	if err != nil {
		return err
	}
	if len(text) > writeDesc {
		return &Error{Op: "create", Err: unsupported("a descriptor of %d bytes", len(text))}
	}
	b := make([]byte, writeOverhead)
	copy(b, s.h.encode())
	copy(b[sector:], text)
	if err := s.emit(b); err != nil {
		return s.fail("create", 0, err)
	}
	return nil
}

// Size returns the size of the disk in bytes.
func (s *StreamWriter) Size() int64 { return s.h.size }

// Written returns the number of bytes of the stream so far: all of it after Commit.
func (s *StreamWriter) Written() int64 { return s.out }

// SHA1 returns the digest of what Written counts.
func (s *StreamWriter) SHA1() []byte { return s.sum.Sum(nil) }

// fail keeps the first error: what could not be written is missing for good.
func (s *StreamWriter) fail(op string, off int64, err error) error {
	s.err = &Error{Op: op, Off: off, Err: err}
	return s.err
}

// admit checks a range before anything is done. Its errors leave the writer usable.
func (s *StreamWriter) admit(op string, off, n int64) error {
	switch {
	case s.err != nil:
		return s.err
	case s.done:
		return &Error{Op: op, Off: off, Err: ErrClosed}
	case off < 0 || n < 0 || off > s.h.size || n > s.h.size-off:
		return &Error{Op: op, Off: off, Err: ErrBounds}
	case off < s.pos:
		return &Error{Op: op, Off: off, Err: ErrOrder}
	}
	return nil
}

// WriteAt writes p to the disk at byte offset off, which must not be before the end of the last
// write. p is not retained.
func (s *StreamWriter) WriteAt(p []byte, off int64) (int, error) {
	if err := s.admit("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	for n := 0; n < len(p); {
		at, in := (off+int64(n))/writeGrain, (off+int64(n))%writeGrain
		if at != s.bufAt {
			if err := s.flush(); err != nil {
				return n, s.fail("write", off+int64(n), err)
			}
			clear(s.buf)
			s.bufAt = at
		}
		n += copy(s.buf[in:], p[n:])
		s.pos = off + int64(n)
	}
	return len(p), nil
}

// WriteZeroes makes n bytes at off zero, in the manner of WriteAt.
func (s *StreamWriter) WriteZeroes(off, n int64) error {
	if err := s.admit("zero", off, n); err != nil {
		return err
	}
	s.pos = off + n
	return nil
}

// flush hands the filled grain to a packer.
func (s *StreamWriter) flush() error {
	at := s.bufAt
	s.bufAt = -1
	if at < 0 || bytes.Equal(s.buf, s.zeros) {
		return nil
	}
	if len(s.free) == 0 {
		if err := s.retire(); err != nil {
			return err
		}
	}
	p := s.free[len(s.free)-1]
	s.free = s.free[:len(s.free)-1]
	p.in, s.buf, p.at = s.buf, p.in, at
	s.busy = append(s.busy, p)
	go p.pack() // it ends by itself, and ready takes its result without a receiver
	return nil
}

// retire waits for the oldest grain and writes it.
func (s *StreamWriter) retire() error {
	p := s.busy[0]
	s.busy = s.busy[:copy(s.busy, s.busy[1:])]
	err := <-p.ready
	s.free = append(s.free, p)
	if err != nil {
		return err
	}
	if table := p.at / writeGTEs; table != s.gtAt {
		if err := s.flushTable(); err != nil {
			return err
		}
		s.gtAt = table
	}
	if s.out > maxStream-int64(p.out.Len()) {
		return unsupported("a file of more than %d bytes", int64(maxStream))
	}
	binary.LittleEndian.PutUint32(s.gt[p.at%writeGTEs*4:], uint32(s.out/sector))
	return s.emit(p.out.Bytes())
}

// emit writes to the stream, which is always at a sector.
func (s *StreamWriter) emit(b []byte) error {
	n, err := s.w.Write(b)
	s.sum.Write(b[:n])
	s.out += int64(n)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	return err
}

// marker writes a marker sector that announces size bytes.
func (s *StreamWriter) marker(kind uint32, size int64) error {
	b := make([]byte, sector)
	binary.LittleEndian.PutUint64(b, uint64(size/sector))
	binary.LittleEndian.PutUint32(b[12:], kind)
	return s.emit(b)
}

func (s *StreamWriter) flushTable() error {
	if s.gtAt < 0 {
		return nil
	}
	if err := s.marker(markerGT, int64(len(s.gt))); err != nil {
		return err
	}
	if s.out > maxStream-int64(len(s.gt)) {
		return unsupported("a file of more than %d bytes", int64(maxStream))
	}
	s.gd[s.gtAt] = uint32(s.out / sector)
	err := s.emit(s.gt)
	clear(s.gt)
	return err
}

// Commit completes the stream: what was not written is zero. A file made by CreateStream is made
// durable and gets its name.
func (s *StreamWriter) Commit() error {
	if err := s.admit("commit", s.h.size, 0); err != nil {
		return err
	}
	s.done = true
	if err := s.commit(); err != nil {
		return s.fail("commit", s.pos, err)
	}
	return nil
}

func (s *StreamWriter) commit() error {
	if err := s.flush(); err != nil {
		return err
	}
	for len(s.busy) > 0 {
		if err := s.retire(); err != nil {
			return err
		}
	}
	if err := s.flushTable(); err != nil {
		return err
	}
	gd := make([]byte, roundUp(int64(len(s.gd))*4, sector))
	for i, e := range s.gd {
		binary.LittleEndian.PutUint32(gd[i*4:], e)
	}
	if err := s.marker(markerGD, int64(len(gd))); err != nil {
		return err
	}
	s.h.gd = s.out
	if err := s.emit(gd); err != nil {
		return err
	}
	if err := s.marker(markerFooter, sector); err != nil {
		return err
	}
	if err := s.emit(s.h.encode()); err != nil {
		return err
	}
	if err := s.marker(markerEOS, 0); err != nil {
		return err
	}
	if s.end == nil {
		return nil
	}
	if err := s.sync(); err != nil {
		return err
	}
	return s.end(true)
}

// Close abandons the stream unless it is committed: it then lacks its end. It is idempotent.
func (s *StreamWriter) Close() error {
	committed := s.done && s.err == nil
	s.done = true
	for _, p := range s.busy {
		<-p.ready
	}
	s.busy = nil
	if s.end == nil || committed {
		return nil
	}
	end := s.end
	s.end = nil
	if err := end(false); err != nil {
		return &Error{Op: "close", Err: err}
	}
	return nil
}
