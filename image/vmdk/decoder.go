package vmdk

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"runtime"
)

// DecoderOptions say what a Decoder expects. The zero value expects nothing in particular.
type DecoderOptions struct {
	Workers int    // grains inflated at a time; 0: one per processor, at most 16
	Size    int64  // length the stream must have, in bytes; 0: not checked
	SHA1    []byte // digest the stream must have; nil: not checked
}

// Decoder reads a streamOptimized image from a stream, once, in a bounded amount of memory:
// about four grains per worker, and a few MiB per TiB of disk. It is strict. A stream must have its
// grains in ascending order and inside the disk, metadata of the length that the header implies,
// grain tables and a directory that say of each grain what came and where, a footer that repeats
// the header when the header refers to one, the end-of-stream marker, and behind that nothing but
// zeros. Anything else is an error, never a shorter disk.
//
// qemu-img writes no end-of-stream marker, but has the grain tables in front. They are kept, which
// takes 64 MiB per TiB of disk, each grain must lie where they say, and the stream may end where
// all that they name have come. More than 256 MiB in front of the grains is not supported.
type Decoder struct {
	r      *bufio.Reader
	opts   DecoderOptions
	h      *header
	head   []byte
	desc   *Descriptor
	off    int64 // bytes consumed
	sum    hash.Hash
	used   bool
	last   int64 // index of the last grain, -1 before the first
	footed bool  // the footer was seen
	dirAt  int64 // where the grain directory began, -1 before it
	data   int64 // bytes of grains
	front  *frontTables
	back   backTables

	free []*inflater
	busy []*inflater
}

// NewDecoder reads header and descriptor from r. opts may be nil.
func NewDecoder(r io.Reader, opts *DecoderOptions) (*Decoder, error) {
	d := &Decoder{last: -1, dirAt: -1, sum: sha1.New()}
	if opts != nil {
		d.opts = *opts
	}
	if d.opts.Workers <= 0 {
		d.opts.Workers = runtime.GOMAXPROCS(0)
	}
	d.r = bufio.NewReaderSize(r, 256<<10)
	if err := d.begin(); err != nil {
		return nil, &Error{Op: "decode", Off: d.off, Err: err}
	}
	d.back = newBackTables(d.h)
	for range min(d.opts.Workers, maxWorkers) + 2 {
		d.free = append(d.free, &inflater{ready: make(chan error, 1)})
	}
	return d, nil
}

// read fills p from the stream.
func (d *Decoder) read(p []byte) error {
	n, err := io.ReadFull(d.r, p)
	d.sum.Write(p[:n])
	d.off += int64(n)
	if err == io.EOF || err == io.ErrUnexpectedEOF { // bare: a wrapped one is no end
		return ErrTruncated
	}
	return err
}

func (d *Decoder) begin() error {
	d.head = make([]byte, sector)
	if err := d.read(d.head); err != nil {
		return err
	}
	h, err := parseHeader(d.head)
	if err != nil {
		return err
	}
	d.h = h
	switch {
	case h.cowd || !h.compressed || !h.markers:
		return unsupported("a stream of another kind of sparse file")
	case h.overhead < sector:
		return corrupt("%d bytes before the first grain", h.overhead)
	case h.overhead > maxOverhead:
		return unsupported("%d bytes before the first grain", h.overhead)
	case h.descSize > 0 && (h.descOff > h.overhead || h.descSize > h.overhead-h.descOff):
		return corrupt("descriptor of %d bytes at %d, data begin at %d", h.descSize, h.descOff, h.overhead)
	}
	if h.descSize > 0 {
		if err := d.skip(h.descOff - d.off); err != nil {
			return err
		}
		b := make([]byte, h.descSize) // at most 1 MiB
		if err := d.read(b); err != nil {
			return err
		}
		if d.desc, _, err = parseDescriptor(b); err != nil {
			return err
		}
		if n := d.desc.Size(); n != h.size || len(d.desc.Extents) != 1 {
			return corrupt("descriptor of %d extents, %d bytes, header of %d bytes", len(d.desc.Extents), n, h.size)
		}
		if d.desc.ParentCID != NoParent {
			return unsupported("a stream that is a delta")
		}
	}
	return d.takeFront()
}

// Size returns the size of the disk in bytes.
func (d *Decoder) Size() int64 { return d.h.size }

// GrainSize returns the size of all grains but perhaps the last, in bytes.
func (d *Decoder) GrainSize() int64 { return d.h.grain }

// Descriptor returns the embedded descriptor, nil when there is none. It must not be changed.
func (d *Decoder) Descriptor() *Descriptor { return d.desc }

// Consumed returns the number of bytes read of the stream, all of it once Decode has succeeded.
func (d *Decoder) Consumed() int64 { return d.off }

// DataBytes returns how much of the disk was handed to fn, in bytes.
func (d *Decoder) DataBytes() int64 { return d.data }

// SHA1 returns the digest of what Consumed counts.
func (d *Decoder) SHA1() []byte { return d.sum.Sum(nil) }

// Decode calls fn, from this goroutine, for each grain in ascending order: p is what the disk has
// at byte offset off, valid until fn returns. What fn is not called for is zeros. Only when Decode
// returns nil has the stream been complete and in order; otherwise all that fn was given is void.
// An error of fn ends it and is returned as it is. ctx is looked at between grains: to end a read
// that blocks, close what is under the reader. A Decoder decodes once.
func (d *Decoder) Decode(ctx context.Context, fn func(off int64, p []byte) error) error {
	if d.used {
		return &Error{Op: "decode", Off: d.off, Err: ErrClosed}
	}
	d.used = true
	defer d.drain()
	for {
		if err := ctx.Err(); err != nil {
			return &Error{Op: "decode", Off: d.off, Err: err}
		}
		at := d.off
		more, err := d.next(fn)
		if err != nil {
			if own := (*callbackError)(nil); errors.As(err, &own) {
				return own.err
			}
			return &Error{Op: "decode", Off: at, Err: err}
		}
		if !more {
			break
		}
	}
	for len(d.busy) > 0 {
		if err := d.retire(fn); err != nil {
			if own := (*callbackError)(nil); errors.As(err, &own) {
				return own.err
			}
			return &Error{Op: "decode", Off: d.off, Err: err}
		}
	}
	if err := d.finish(ctx); err != nil {
		return &Error{Op: "decode", Off: d.off, Err: err}
	}
	return nil
}

type callbackError struct{ err error }

func (e *callbackError) Error() string { return e.err.Error() }

func (d *Decoder) drain() {
	for _, f := range d.busy {
		<-f.ready
	}
	d.busy = nil
}

// next takes one marker and what belongs to it. It reports false at the end of the stream.
func (d *Decoder) next(fn func(int64, []byte) error) (bool, error) {
	var m [sector]byte
	if d.front != nil {
		if _, err := d.r.Peek(1); err == io.EOF { // bare: a wrapped one is no end
			return false, d.front.complete()
		}
	}
	if err := d.read(m[:]); err != nil {
		return false, err
	}
	val, size := binary.LittleEndian.Uint64(m[:]), int64(binary.LittleEndian.Uint32(m[8:]))
	if size > 0 {
		return true, d.takeGrain(m[:], val, size, fn)
	}
	if !zero(m[16:]) {
		return false, corrupt("a marker sector with %d sectors and no size holds data", val)
	}
	kind := binary.LittleEndian.Uint32(m[12:])
	if d.footed && kind != markerEOS {
		return false, corrupt("marker of type %d behind the footer", kind)
	}
	if d.dirAt >= 0 && kind != markerFooter && kind != markerEOS {
		return false, corrupt("marker of type %d behind the grain directory", kind)
	}
	switch kind {
	case markerEOS:
		if val != 0 {
			return false, corrupt("end of stream that announces %d sectors", val)
		}
		if d.h.gd < 0 && !d.footed {
			return false, corrupt("it ends without the footer that its header refers to")
		}
		if d.front == nil && d.h.gd >= 0 && d.h.gd != d.dirAt && d.h.size > 0 {
			return false, corrupt("the header has the grain directory at %d instead of %d (-1: nowhere)", d.h.gd, d.dirAt)
		}
		if d.front != nil {
			return false, d.front.complete()
		}
		return false, nil
	case markerGT:
		if want := divUp(d.h.gtes*4, sector); val != uint64(want) {
			return false, corrupt("grain table of %d sectors instead of %d", val, want)
		}
		return true, d.takeTable()
	case markerGD:
		if want := divUp(d.h.gdEntries()*4, sector); val != uint64(want) {
			return false, corrupt("grain directory of %d sectors instead of %d", val, want)
		}
		d.dirAt = d.off
		return true, d.takeDirectory()
	case markerFooter:
		if val != 1 {
			return false, corrupt("footer of %d sectors", val)
		}
		return true, d.takeFooter()
	}
	return false, corrupt("marker of type %d", kind)
}

// takeGrain reads the rest of a grain whose first sector is m, and has it inflated.
func (d *Decoder) takeGrain(m []byte, lba uint64, size int64, fn func(int64, []byte) error) error {
	if d.footed || d.dirAt >= 0 {
		return corrupt("grain behind grain directory or footer")
	}
	per := uint64(d.h.grain / sector)
	if lba%per != 0 || lba >= uint64(divUp(d.h.size, sector)) {
		return corrupt("grain at sector %d of %d", lba, d.h.size/sector)
	}
	at := int64(lba / per)
	if at <= d.last {
		return corrupt("grain %d behind grain %d", at, d.last)
	}
	if size > compressedBound(d.h.grain) {
		return corrupt("grain of %d compressed bytes", size)
	}
	if d.front == nil {
		d.back.grain(at, d.off-sector)
	} else if err := d.front.admit(at, d.off-sector); err != nil {
		return err
	}
	d.last = at
	if len(d.free) == 0 {
		if err := d.retire(fn); err != nil {
			return err
		}
	}
	f := d.free[len(d.free)-1]
	total := roundUp(12+size, sector)
	if int64(cap(f.in)) < total {
		f.in = make([]byte, roundUp(compressedBound(d.h.grain)+12, sector))
	}
	if f.out == nil {
		f.out = make([]byte, d.h.grain)
	}
	f.in, f.size, f.at = f.in[:total], size, at
	f.least = min(d.h.grain, d.h.size-at*d.h.grain)
	copy(f.in, m)
	if err := d.read(f.in[sector:]); err != nil {
		return err
	}
	if !zero(f.in[12+size:]) {
		return corrupt("grain %d is not padded with zeros", at)
	}
	d.free = d.free[:len(d.free)-1]
	d.busy = append(d.busy, f)
	go f.inflate() // it ends by itself, and ready takes its result without a receiver
	return nil
}

// retire waits for the oldest grain and hands it out.
func (d *Decoder) retire(fn func(int64, []byte) error) error {
	f := d.busy[0]
	d.busy = d.busy[:copy(d.busy, d.busy[1:])]
	err := <-f.ready
	d.free = append(d.free, f)
	if err != nil {
		return fmt.Errorf("grain %d: %w", f.at, err)
	}
	off := f.at * d.h.grain
	n := min(d.h.grain, d.h.size-off)
	d.data += n
	if err := fn(off, f.out[:n]); err != nil {
		return &callbackError{err}
	}
	return nil
}

// finish reads what follows the end of the stream, and compares the digest.
func (d *Decoder) finish(ctx context.Context) error {
	var b [4096]byte
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := d.r.Read(b[:])
		d.sum.Write(b[:n])
		d.off += int64(n)
		if !zero(b[:n]) {
			return corrupt("data behind the end of the stream")
		}
		if err == io.EOF { // bare: a wrapped one is no end
			break
		}
		if err != nil {
			return err
		}
		if d.opts.Size > 0 && d.off > d.opts.Size {
			break
		}
	}
	if d.opts.Size > 0 && d.off != d.opts.Size {
		return fmt.Errorf("%w: %d bytes instead of %d", ErrDigest, d.off, d.opts.Size)
	}
	if d.opts.SHA1 != nil && !bytes.Equal(d.opts.SHA1, d.SHA1()) {
		return fmt.Errorf("%w: SHA-1 is %x instead of %x", ErrDigest, d.SHA1(), d.opts.SHA1)
	}
	return nil
}
