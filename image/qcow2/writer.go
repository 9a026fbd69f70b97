package qcow2

import (
	"bytes"
	"encoding/binary"
)

const (
	writeBits    = 16
	writeCluster = 1 << writeBits
	writeEntries = writeCluster / 8 // entries of an L2 table: 512 MiB of disk
	refEntries   = writeCluster / 2 // entries of a refcount block: 2 GiB of file

	// MaxSize is the largest virtual size that a Writer takes, in bytes.
	MaxSize = 64 << 40
)

// File is what a Writer writes to: an empty file.
type File interface {
	WriteAt(p []byte, off int64) (int, error)
	// Sync makes everything written durable.
	Sync() error
}

// Writer writes a version 3 image with 64 KiB clusters. Writes come from one goroutine, ascending
// and without overlap; what is skipped, written as zeros or zeroed is a hole in the image. It
// holds about 200 KiB, plus 16 KiB per TiB of disk.
//
// The file has no valid header until Commit, so an image that was not committed is never taken
// for one. After an error of the file the writer takes nothing more and Commit fails.
type Writer struct {
	f    File
	end  func(commit bool) error // what Create adds; nil for NewWriter
	size int64                   // virtual size, a multiple of 512
	pos  int64                   // first byte of the disk that may still be written
	next int64                   // first free cluster of the file

	l1    []uint64
	l2    []byte
	l2At  int64  // index of the L1 entry that l2 belongs to, -1 for none
	used  bool   // l2 holds an entry
	buf   []byte // a cluster that is written in pieces
	bufAt int64  // its index, -1 for none
	zeros []byte // one cluster, never changed

	err  error
	done bool
}

// NewWriter returns a Writer for a disk of size bytes, rounded up to a multiple of 512 because
// images have whole sectors: Size says how large the disk is. f must be empty. It stays the
// caller's: Close does not close it, nor remove it.
func NewWriter(f File, size int64) (*Writer, error) {
	if size < 0 || size > MaxSize {
		return nil, &Error{Op: "create", Off: size, Err: ErrSize}
	}
	size = (size + sector - 1) &^ (sector - 1)
	w := &Writer{
		f: f, size: size, l2At: -1, bufAt: -1,
		l1:    make([]uint64, max(1, divUp(size, writeEntries*writeCluster))),
		l2:    make([]byte, writeCluster),
		buf:   make([]byte, writeCluster),
		zeros: make([]byte, writeCluster),
	}
	w.next = writeCluster + roundUp(int64(len(w.l1))*8)
	return w, nil
}

func divUp(n, d int64) int64 { return (n + d - 1) / d }

func roundUp(n int64) int64 { return divUp(n, writeCluster) * writeCluster }

// Size returns the virtual size of the disk in bytes.
func (w *Writer) Size() int64 { return w.size }

// fail keeps the first error: what could not be written is missing for good.
func (w *Writer) fail(op string, off int64, err error) error {
	w.err = &Error{Op: op, Off: off, Err: err}
	return w.err
}

// admit checks a range before anything is done. Its errors leave the writer usable.
func (w *Writer) admit(op string, off, n int64) error {
	switch {
	case w.err != nil:
		return w.err
	case w.done:
		return &Error{Op: op, Off: off, Err: ErrClosed}
	case off < 0 || n < 0 || off > w.size || n > w.size-off:
		return &Error{Op: op, Off: off, Err: ErrBounds}
	case off < w.pos:
		return &Error{Op: op, Off: off, Err: ErrOrder}
	}
	return nil
}

// WriteAt writes p to the disk at byte offset off, which must not be before the end of the last
// write. Clusters of zeros take no space. p is not retained.
func (w *Writer) WriteAt(p []byte, off int64) (int, error) {
	if err := w.admit("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	for n := 0; n < len(p); {
		k, err := w.writePiece(p[n:], off+int64(n))
		if err != nil {
			return n, w.fail("write", off+int64(n), err)
		}
		n += k
		w.pos = off + int64(n)
	}
	return len(p), nil
}

// WriteZeroes makes n bytes at off zero, in the manner of WriteAt. It only leaves a hole.
func (w *Writer) WriteZeroes(off, n int64) error {
	if err := w.admit("zero", off, n); err != nil {
		return err
	}
	w.pos = off + n
	return nil
}

// writePiece takes the head of p: a part of one cluster, or many whole ones.
func (w *Writer) writePiece(p []byte, off int64) (int, error) {
	at, in := off/writeCluster, off%writeCluster
	if w.bufAt >= 0 && w.bufAt != at {
		if err := w.flushBuf(); err != nil {
			return 0, err
		}
	}
	if in == 0 && len(p) >= writeCluster { // nothing of this cluster can be in buf
		return w.writeWhole(p, at)
	}
	if w.bufAt < 0 {
		clear(w.buf)
		w.bufAt = at
	}
	return copy(w.buf[in:], p), nil
}

// writeWhole takes a run of whole clusters at the head of p that are all zeros or all data.
func (w *Writer) writeWhole(p []byte, at int64) (int, error) {
	isZero := bytes.Equal(p[:writeCluster], w.zeros)
	n := writeCluster
	most := min(int64(len(p)), (writeEntries-at%writeEntries)*writeCluster) // within one L2 table
	for int64(n+writeCluster) <= most && bytes.Equal(p[n:n+writeCluster], w.zeros) == isZero {
		n += writeCluster
	}
	if isZero {
		return n, nil
	}
	return n, w.allocate(p[:n], at)
}

// allocate appends whole clusters to the file and enters them in the L2 table.
func (w *Writer) allocate(p []byte, at int64) error {
	if table := at / writeEntries; table != w.l2At {
		if err := w.flushL2(); err != nil {
			return err
		}
		w.l2At = table
	}
	host := w.next
	w.next += int64(len(p))
	if _, err := w.f.WriteAt(p, host); err != nil {
		return err
	}
	for i := at % writeEntries; host < w.next; i, host = i+1, host+writeCluster {
		binary.BigEndian.PutUint64(w.l2[i*8:], uint64(host)|flagCopied)
	}
	w.used = true
	return nil
}

func (w *Writer) flushBuf() error {
	at := w.bufAt
	w.bufAt = -1
	if at < 0 || bytes.Equal(w.buf, w.zeros) {
		return nil
	}
	return w.allocate(w.buf, at)
}

func (w *Writer) flushL2() error {
	if !w.used {
		return nil
	}
	if _, err := w.f.WriteAt(w.l2, w.next); err != nil {
		return err
	}
	w.l1[w.l2At] = uint64(w.next) | flagCopied
	w.next += writeCluster
	clear(w.l2)
	w.used = false
	return nil
}

// Commit completes the image, writes its header last and makes it durable. What was not written
// is zero.
func (w *Writer) Commit() error {
	if err := w.admit("commit", w.size, 0); err != nil {
		return err
	}
	w.done = true
	if err := w.commit(); err != nil {
		return w.fail("commit", w.pos, err)
	}
	return nil
}

func (w *Writer) commit() error {
	if err := w.flushBuf(); err != nil {
		return err
	}
	if err := w.flushL2(); err != nil {
		return err
	}
	l1 := make([]byte, roundUp(int64(len(w.l1))*8))
	for i, e := range w.l1 {
		binary.BigEndian.PutUint64(l1[i*8:], e)
	}
	if _, err := w.f.WriteAt(l1, writeCluster); err != nil {
		return err
	}
	tableOff, tableClusters, err := w.writeRefcounts()
	if err != nil {
		return err
	}
	if err := w.f.Sync(); err != nil {
		return err
	}
	if _, err := w.f.WriteAt(w.header(tableOff, tableClusters), 0); err != nil {
		return err
	}
	if err := w.f.Sync(); err != nil {
		return err
	}
	if w.end != nil {
		return w.end(true)
	}
	return nil
}

// writeRefcounts appends refcount blocks and their table. Every cluster of the file, these
// included, is used exactly once.
func (w *Writer) writeRefcounts() (tableOff, tableClusters int64, err error) {
	used := w.next / writeCluster
	blocks := int64(0)
	for {
		need := divUp(used+blocks+tableClusters, refEntries)
		t := divUp(need*8, writeCluster)
		if need == blocks && t == tableClusters {
			break
		}
		blocks, tableClusters = need, t
	}
	block := make([]byte, writeCluster)
	for i := 1; i < len(block); i += 2 {
		block[i] = 1
	}
	table := make([]byte, tableClusters*writeCluster)
	for i, left := int64(0), used+blocks+tableClusters; i < blocks; i, left = i+1, left-refEntries {
		if left < refEntries {
			clear(block[left*2:])
		}
		if _, err := w.f.WriteAt(block, w.next); err != nil {
			return 0, 0, err
		}
		binary.BigEndian.PutUint64(table[i*8:], uint64(w.next))
		w.next += writeCluster
	}
	tableOff = w.next
	w.next += int64(len(table))
	_, err = w.f.WriteAt(table, tableOff)
	return tableOff, tableClusters, err
}

func (w *Writer) header(tableOff, tableClusters int64) []byte {
	b := make([]byte, headerWritten) // the rest of the cluster is a hole, which ends the extensions
	be := binary.BigEndian
	be.PutUint32(b[0:], magic)
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], writeBits)
	be.PutUint64(b[24:], uint64(w.size))
	be.PutUint32(b[36:], uint32(len(w.l1)))
	be.PutUint64(b[40:], writeCluster)
	be.PutUint64(b[48:], uint64(tableOff))
	be.PutUint32(b[56:], uint32(tableClusters))
	be.PutUint32(b[96:], 4) // refcounts of 16 bits
	be.PutUint32(b[100:], headerWritten)
	return b // what is not set is zero: no backing file, no features, zlib
}

// Close abandons the image unless it is committed: without a header it is not one. It is
// idempotent.
func (w *Writer) Close() error {
	committed := w.done && w.err == nil
	w.done = true
	if w.end == nil || committed {
		return nil
	}
	end := w.end
	w.end = nil
	if err := end(false); err != nil {
		return &Error{Op: "close", Err: err}
	}
	return nil
}
