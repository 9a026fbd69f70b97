package vmdk

import (
	"encoding/binary"
	"fmt"
)

// takeFront reads up to the first grain, and keeps the grain tables if they are there.
func (d *Decoder) takeFront() error {
	h := d.h
	dir := h.gdEntries() * 4
	if h.gd < d.off || h.gd > h.overhead-dir || dir == 0 {
		return d.skip(h.overhead - d.off)
	}
	if err := d.skip(h.gd - d.off); err != nil {
		return err
	}
	at := d.off
	var b []byte
	for d.off < h.overhead { // in pieces: the length is merely claimed
		p := make([]byte, min(h.overhead-d.off, 64<<10))
		if err := d.read(p); err != nil {
			return err
		}
		b = append(b, p...)
	}
	var err error
	d.front, err = newFrontTables(h, at, b)
	return err
}

// skip reads n bytes that mean nothing here.
func (d *Decoder) skip(n int64) error {
	var b [16 * sector]byte
	for n > 0 {
		k := min(n, int64(len(b)))
		if err := d.read(b[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// takeTable reads a grain table.
func (d *Decoder) takeTable() error {
	at := d.off
	b := make([]byte, roundUp(d.h.gtes*4, sector)) // at most 16 KiB
	if err := d.read(b); err != nil {
		return err
	}
	if d.front == nil {
		d.back.table(at, b[:d.h.gtes*4])
	}
	return nil
}

// takeDirectory reads the grain directory, and checks it, its tables and the grains against each
// other.
func (d *Decoder) takeDirectory() error {
	var b [sector]byte
	for i := int64(0); i < d.h.gdEntries(); i += sector / 4 {
		if err := d.read(b[:]); err != nil {
			return err
		}
		if d.front != nil {
			continue
		}
		for k := range min(sector/4, d.h.gdEntries()-i) {
			if err := d.back.entry(i+k, binary.LittleEndian.Uint32(b[k*4:])); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *Decoder) takeFooter() error {
	b := make([]byte, sector)
	if err := d.read(b); err != nil {
		return err
	}
	f, err := parseHeader(b)
	if err != nil {
		return fmt.Errorf("footer: %w", err)
	}
	if f.cowd || f.size != d.h.size || f.grain != d.h.grain || f.gtes != d.h.gtes || f.flags != d.h.flags {
		return corrupt("the footer is not that of this header")
	}
	if f.gd < 0 || f.gd != d.dirAt {
		return corrupt("the footer has the grain directory at %d instead of %d (-1: nowhere)", f.gd, d.dirAt)
	}
	d.footed = true
	return nil
}
